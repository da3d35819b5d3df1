//! The image: the Dockerfile builds what `make static` builds and measures, and the chart runs it as the user that it names.
//!
//! The build itself takes minutes and is not a test: `make static` fails if the program is not static or too large.

use crate::{Result, read};

/// The words after `keyword` on each line of a text that begins with it.
fn lines<'a>(text: &'a str, keyword: &'a str) -> Vec<&'a str> {
    text.lines()
        .filter_map(|line| line.strip_prefix(keyword))
        .map(str::trim)
        .collect()
}

#[test]
fn the_image_holds_what_make_static_builds_and_nothing_to_break_in_with() -> Result {
    let dockerfile = read("Dockerfile")?;
    let (build, image) = dockerfile.rsplit_once("FROM ").ok_or("the Dockerfile has no FROM")?;
    let toolchain: toml::Value = toml::from_str(&read("rust-toolchain.toml")?)?;
    let channel = toolchain["toolchain"]["channel"].as_str().unwrap_or_default();
    let (version, _) = channel.rsplit_once('.').ok_or("the toolchain is x.y.z")?;
    assert_eq!(lines(build, "FROM "), [format!("rust:{version}-bookworm AS build")]);
    assert!(lines(build, "RUN ").contains(&"make static"), "{build}");

    assert_eq!(image.lines().next(), Some("scratch"), "no shell, no package manager");
    assert_eq!(lines(image, "RUN "), [""; 0]);
    let made = "target/image/berth";
    assert!(read("Makefile")?.contains(&format!("cp target/$(MUSL)/release/berth {made}")));
    assert_eq!(
        lines(image, "COPY "),
        [
            "--from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt".to_owned(),
            format!("--from=build /src/{made} /berth"),
        ]
    );
    assert_eq!(lines(image, "ENTRYPOINT "), [r#"["/berth"]"#]);
    let deployment = read("charts/berth/templates/deployment.yaml")?;
    for user in lines(image, "USER ") {
        let (user, group) = user.split_once(':').ok_or("user and group")?;
        assert!(deployment.contains(&format!("runAsUser: {user}\n")), "{user}");
        assert!(deployment.contains(&format!("runAsGroup: {group}\n")), "{group}");
    }
    assert_eq!(lines(image, "USER ").len(), 1, "not root");
    Ok(())
}
