//! End-to-end tests: each drives the installed program as a person or a script would and looks at what they would see. They are
//! written once and run on every engine.
//!
//! `CLOISON_DIST` is the directory of the built product, `CLOISON_TEST_IMAGES` that of the images made by `tests/images`, and
//! `CLOISON_TEST_DATA` a data directory they share, and `CLOISON_ENGINE` the engine (see `tests/all`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on has failed"
)]

mod dockerd;
mod host;
mod pty;
mod trees;
mod world;

mod bad_input;
mod containerd;
mod debian;
mod detached;
mod docker;
mod docker_build;
mod docker_faults;
mod docker_newer;
mod docker_services;
mod engine;
mod exec;
mod faults;
mod install;
mod isolation;
mod limits;
mod mounts;
mod network;
mod oci;
mod oci_descriptors;
mod oci_mounts;
mod oci_process;
mod oci_sockets;
mod oci_spec;
mod oci_terminal;
mod oci_update;
mod podman;
mod pods;
mod process;
mod profile;
mod signals;
mod stdio;
mod stress;
mod systemd;
mod templates;
mod terminal;
