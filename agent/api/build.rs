//! Generates the protocol's messages, client and service from `agent.proto` with parsers written in
//! Rust: a build needs no `protoc`.

use std::path::Path;
use std::{env, fs, io};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTO: &str = "protos/agent.proto";

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed={PROTO}");
    let out = env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?;
    Codegen::new()
        .out_dir(&out)
        .input(PROTO)
        .include("protos")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize {
            async_all: true,
            ..Customize::default()
        })
        .run()?;

    let out = Path::new(&out);
    fs::write(out.join("mod.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")?;
    // The generator permits itself unsafe code and uses none; without the permission the crate can forbid it.
    let service = out.join("agent_ttrpc.rs");
    let source = fs::read_to_string(&service)?;
    fs::write(&service, source.replace("#![allow(unsafe_code)]\n", ""))
}
