//! The agent's replies: each call of the host's, answered with any bytes in a well-formed frame, in a frame that lies, or in none.

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;

use cloison_sandbox::Agent;
use oci_spec::runtime::LinuxResources;
use tokio::runtime::{Builder, Runtime};

use crate::input::Input;

pub fn agent_reply(data: &[u8]) {
    thread_local! {
        static RUNTIME: RefCell<Runtime> = RefCell::new(
            Builder::new_current_thread().enable_all().build().expect("a runtime"),
        );
    }
    let mut input = Input::new(data);
    let call = input.u8();
    let bytes = reply(&mut input, data.len());
    RUNTIME.with_borrow(|runtime| runtime.block_on(answered(call, &bytes)));
}

/// ttrpc's frame: length, stream, type and flags, and the message (its PROTOCOL.md).
fn reply(input: &mut Input<'_>, most: usize) -> Vec<u8> {
    let how = input.u8();
    let (odd_length, odd_stream) = (input.u32(), input.u32());
    let body = input.bytes(most);
    if how & 1 != 0 {
        return body.to_vec();
    }
    let length = if how & 2 == 0 {
        body.len() as u32
    } else {
        odd_length
    };
    let stream = if how & 4 == 0 { 1 } else { odd_stream };
    let kind = if how & 8 == 0 { 2 } else { how >> 4 };
    let mut bytes = Vec::new();
    bytes.extend(length.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, how >> 6]);
    bytes.extend(body);
    bytes
}

async fn answered(call: u8, reply: &[u8]) {
    let (host, mut guest) = UnixStream::pair().expect("a socket");
    guest.set_nonblocking(true).expect("a socket");
    let agent = Agent::over(host).expect("a connection");
    // What does not fit into the socket is not sent; and then the guest is gone.
    let _ = guest.write(reply);
    guest
        .shutdown(std::net::Shutdown::Write)
        .expect("an end of the guest's stream");
    match call % 6 {
        0 => drop(agent.hello().await),
        1 => drop(agent.start("c").await),
        2 => drop(agent.wait("c", "").await),
        3 => drop(agent.signal("c", "", 9, false).await),
        4 => drop(agent.update("c", &LinuxResources::default()).await),
        _ => drop(agent.shutdown(std::time::Duration::ZERO).await),
    }
}
