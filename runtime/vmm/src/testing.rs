//! The control protocol without a VM behind it, for tests of other crates.

pub use crate::control::testing::{control_reply, control_request};
