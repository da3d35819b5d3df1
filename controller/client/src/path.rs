//! Paths of the servers' API, out and in. Every name and project is percent-encoded here and nowhere else, so that no
//! name can reach another resource.

use std::fmt::Write as _;

use berth_core::model::InstanceRef;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// Everything but the unreserved characters of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// `text` as one path segment or query value. URL parsers resolve `.` and `..` away even when encoded: these two, which
/// nothing is ever called, are encoded twice, so that the server looks for a name that does not exist.
pub(crate) fn encode(text: &str) -> String {
    match text {
        "." => "%252E".to_owned(),
        ".." => "%252E%252E".to_owned(),
        _ => utf8_percent_encode(text, RESERVED).to_string(),
    }
}

/// `/1.0/instances/NAME[tail]?project=P`.
pub(crate) fn instance(at: &InstanceRef, tail: &str) -> String {
    format!(
        "/1.0/instances/{}{tail}?project={}",
        encode(&at.name),
        encode(&at.project)
    )
}

/// `/1.0/instances/NAME/snapshots/SNAPSHOT?project=P`.
pub(crate) fn snapshot(at: &InstanceRef, name: &str) -> String {
    instance(at, &format!("/snapshots/{}", encode(name)))
}

/// `path` with one more query parameter.
pub(crate) fn with_query(mut path: String, key: &str, value: &str) -> String {
    let separator = if path.contains('?') { '&' } else { '?' };
    // writing into a String cannot fail
    let _ = write!(path, "{separator}{key}={}", encode(value));
    path
}

/// The instance that a URL of the API names (`/1.0/instances/NAME[/…][?project=P]`, or LXD's `containers`,
/// `virtual-machines`); `project` where the URL names none.
pub(crate) fn instance_of(url: &str, project: &str) -> Option<InstanceRef> {
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let mut segments = path.strip_prefix("/1.0/")?.split('/');
    if !matches!(segments.next()?, "instances" | "containers" | "virtual-machines") {
        return None;
    }
    let name = decode(segments.next().filter(|s| !s.is_empty())?)?;
    let named = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("project="))
        .and_then(decode);
    Some(InstanceRef {
        project: named.unwrap_or_else(|| project.to_owned()),
        name,
    })
}

/// The last path segment of a URL of the API, decoded.
pub(crate) fn last_segment(url: &str) -> Option<String> {
    let path = url.split_once('?').map_or(url, |(path, _)| path);
    decode(path.rsplit('/').next().filter(|s| !s.is_empty())?)
}

fn decode(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_path_segment() {
        let at = InstanceRef::new("a&b=c#d", "../certificates?x=y");
        assert_eq!(
            instance(&at, "/state"),
            "/1.0/instances/..%2Fcertificates%3Fx%3Dy/state?project=a%26b%3Dc%23d"
        );
        assert_eq!(encode(".."), "%252E%252E");
    }

    #[test]
    fn a_resource_url_gives_the_instance_with_its_project() {
        let of = |url| instance_of(url, "listed");
        assert_eq!(
            of("/1.0/instances/web-1?project=shop"),
            Some(InstanceRef::new("shop", "web-1"))
        );
        assert_eq!(of("/1.0/containers/web-1"), Some(InstanceRef::new("listed", "web-1")));
        assert_eq!(
            of("/1.0/instances/web-1/snapshots/s0?a=b&project=s%20p"),
            Some(InstanceRef::new("s p", "web-1"))
        );
        assert_eq!(of("/1.0/instances"), None);
        assert_eq!(of("/1.0/images/abc"), None);
    }
}
