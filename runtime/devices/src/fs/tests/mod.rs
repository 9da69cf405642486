//! The device as a guest meets it: every test speaks FUSE through the queues. They need root, as the device does: owners,
//! device nodes and mounts are the real ones.

mod bounds;
mod client;
mod hostile;
mod mounts;
mod ordinary;
mod queues;
mod random;
