//! A stream of the host's that carries nothing: its end says that the one on whose behalf something runs in the guest is gone.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::AsyncReadExt;

use crate::connect::Stream;

/// One such stream.
pub struct Lifeline(Stream);

impl Lifeline {
    pub fn new(stream: OwnedFd) -> io::Result<Self> {
        Stream::new(stream).map(Self)
    }

    /// Waits for its end, whatever comes through it before.
    pub async fn cut(&mut self) {
        let mut ignored = [0; 64];
        while let Ok(1..) = self.0.read(&mut ignored).await {}
    }
}
