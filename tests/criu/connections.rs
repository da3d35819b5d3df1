//! A client elsewhere that talks with a container all the while it is moved live.

use std::time::{Duration, Instant};

use berth_tests::{NewInstance, Placement, SOON, Test};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{ended, goes_on, live, ticking};

const PORT: u16 = 7000;
/// No answer takes longer.
const ANSWERED: Duration = Duration::from_secs(150);

/// Says a number ten times a second and hears it again, over one connection, until it is told to end: how often, and the longest
/// time to an answer.
async fn talk(mut stream: TcpStream, mut over: watch::Receiver<bool>) -> Result<(u32, Duration), String> {
    let (mut said, mut longest) = (0_u32, Duration::ZERO);
    while !*over.borrow_and_update() {
        said += 1;
        let asked = Instant::now();
        let mut heard = [0; 4];
        let answer = async {
            stream.write_all(&said.to_be_bytes()).await?;
            stream.read_exact(&mut heard).await
        };
        let answer = tokio::time::timeout(ANSWERED, answer).await;
        match answer {
            Ok(Ok(_)) if heard == said.to_be_bytes() => longest = longest.max(asked.elapsed()),
            Ok(Ok(_)) => return Err(format!("{heard:?} instead of {said}")),
            Ok(Err(error)) => return Err(format!("number {said}: {error}")),
            Err(_) => return Err(format!("number {said}: no answer within {ANSWERED:?}")),
        }
        let _ = tokio::time::timeout(Duration::from_millis(100), over.changed()).await;
    }
    Ok((said, longest))
}

pub async fn a_client_of_another_machine_keeps_its_connection(test: Test) {
    let (lab, name) = (test.lab(), test.unique("served"));
    let new = NewInstance {
        profiles: vec!["default".to_owned(), "lan".to_owned()],
        ..NewInstance::movable(true, true)
    };
    ticking(lab.server("t1"), &name, &new).await;
    let address = lab.guest_address(200);
    let serve =
        format!("ip addr add {address}/24 dev eth0; setsid nc -ll -p {PORT} -e /bin/cat </dev/null >/dev/null 2>&1 &");
    let serves = lab.server("t1").exec(&name, &["sh", "-c", &serve]).await;
    assert!(serves.is_ok(), "{serves:?}");
    test.add_servers(&["t1", "t2"]).await;
    test.controller().await;
    test.place(&Placement::new(&name, "t1").with(live())).await;
    test.wait_in_place(&name, "t1", SOON).await;
    // a packet may reach the restored network card before CRIU has restored the socket, and is then answered by a reset: seen
    // once, on a busy machine
    let mut resets = Vec::new();
    for (nth, to) in ["t2", "t1", "t2"].into_iter().enumerate() {
        match moved_in_talk(&test, &name, &address, (nth, to)).await {
            Ok(()) => return,
            Err(reset) if reset.contains("reset by peer") => resets.push(reset),
            Err(error) => panic!("the connection is gone: {error}"),
        }
    }
    panic!("the connection is gone each time: {resets:?}");
}

/// Moves it while a client talks with it; an error says how the connection ended.
async fn moved_in_talk(test: &Test, name: &str, address: &str, (nth, to): (usize, &str)) -> Result<(), String> {
    let stream = berth_tests::wait_for("the container to take a connection", SOON, || async {
        let stream = TcpStream::connect((address, PORT)).await;
        stream.map_err(|error| error.to_string())
    })
    .await;
    let (end, over) = watch::channel(false);
    let client = tokio::spawn(talk(stream, over));
    test.retarget(name, json!({"server": to})).await;
    let done = ended(test, name, nth).await;
    // CRIU before 4.2 cannot read what it needs of a TCP socket on kernels from 6.16 on
    let too_old = done["status"]["undo"]["message"].to_string().contains("criu/sockets.c");
    assert!(too_old || done["status"]["outcome"] == "Succeeded", "{done:#}");
    let at = if too_old {
        &done["spec"]["from"]["server"]
    } else {
        &done["spec"]["to"]["server"]
    };
    let still = goes_on(test.lab().server(at.as_str().unwrap_or_default()), name).await;
    end.send_replace(true);
    let (said, longest) = client.await.unwrap_or_else(|error| panic!("{error}"))?;
    eprintln!(
        "{said} numbers over one connection, the longest answer took {longest:.2?}; stood still for {still:.2} s"
    );
    Ok(())
}
