//! Serves the agent's calls on every connection there is: the one the agent itself makes to the host at boot and those
//! it accepts. Losing a connection means nothing, until the guest has been shut down: then the VM ends with it.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use cloison_agent_api::agent_ttrpc::create_agent;
use futures_core::Stream as Sequence;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use ttrpc::r#async::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::connect::Stream;
use crate::service::Service;

/// Connections that wait to be served.
const BACKLOG: usize = 64;

/// Hands connected sockets to the server.
#[derive(Clone)]
pub struct Connections {
    sender: mpsc::Sender<io::Result<Connection>>,
    over: Arc<AtomicBool>,
    end: fn(),
}

impl Connections {
    /// Has a connected, non-blocking stream socket served.
    pub async fn serve(&self, socket: OwnedFd) -> io::Result<()> {
        let connection = Connection {
            stream: Stream::new(socket)?,
            over: Arc::clone(&self.over),
            end: self.end,
        };
        let sent = self.sender.send(Ok(connection)).await;
        sent.map_err(|_| io::Error::other("the server is gone"))
    }
}

/// Starts to serve. `end` is called when a connection closes after the guest has been shut down. The server stops when
/// it is dropped.
pub async fn start(service: Service, end: fn()) -> ttrpc::Result<(Server, Connections)> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    let connections = Connections {
        sender,
        over: service.over(),
        end,
    };
    let mut server = Server::new()
        .register_service(create_agent(Arc::new(service)))
        .add_listener(Listener::new(Incoming(receiver)));
    server.start().await?;
    Ok((server, connections))
}

struct Incoming(mpsc::Receiver<io::Result<Connection>>);

impl Sequence for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

struct Connection {
    stream: Stream,
    over: Arc<AtomicBool>,
    end: fn(),
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.over.load(Ordering::Acquire) {
            (self.end)();
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
