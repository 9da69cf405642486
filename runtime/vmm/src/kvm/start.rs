//! What a guest begins from: a kernel that boots, or the place in its life at which another was saved.

use std::fs::File;
use std::io;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::KvmError;
use super::image::Image;
use super::layout::MP_TABLE;
use super::root::Root;
use super::{boot, kernel, mptable};
use crate::spec::VmSpec;

/// How a guest begins.
pub(super) enum Start<'a> {
    /// It boots, with these words on its command line.
    Boot(&'a str),
    /// It goes on.
    Load(Box<Image>),
}

/// What is in a guest's memory before its first instruction.
pub(super) struct Content {
    pub(super) root: Root,
    /// Where a guest that boots begins.
    pub(super) entry: u64,
    /// Up to where files have been laid over the memory.
    pub(super) laid: u64,
}

impl Start<'_> {
    /// Fills the guest's memory.
    pub(super) fn lay(
        &self,
        spec: &VmSpec,
        memory: &mut GuestMemoryMmap,
    ) -> Result<Content, KvmError> {
        match self {
            Self::Boot(words) => lay_kernel(spec, words, memory),
            Self::Load(image) => lay_image(spec, image, memory),
        }
    }
}

fn lay_kernel(
    spec: &VmSpec,
    words: &str,
    memory: &mut GuestMemoryMmap,
) -> Result<Content, KvmError> {
    let kernel = kernel::load(&open("guest kernel", &spec.kernel)?, memory);
    let kernel = kernel.map_err(|source| KvmError::Kernel {
        path: spec.kernel.clone(),
        source,
    })?;
    let path = &spec.initramfs;
    let root = Root::lay(&open(INITRAMFS, path)?, memory, &kernel, spec.memory_mib);
    let root = root.map_err(in_file(INITRAMFS, path))??;
    let command_line = boot::command_line(&root, words)?;
    boot::write(memory, &command_line, &root)?;
    let table = mptable::build(spec.max_vcpus);
    memory
        .write_slice(&table, GuestAddress(MP_TABLE))
        .map_err(|source| KvmError::Write {
            what: "MP table",
            source,
        })?;
    Ok(Content {
        root,
        entry: kernel.entry,
        laid: kernel.end,
    })
}

fn lay_image(
    spec: &VmSpec,
    image: &Image,
    memory: &mut GuestMemoryMmap,
) -> Result<Content, KvmError> {
    image.lay(memory).map_err(KvmError::Template)?;
    let path = &spec.initramfs;
    let root = Root::map(&open(INITRAMFS, path)?, memory).map_err(in_file(INITRAMFS, path))?;
    let changed = || KvmError::Template(io::ErrorKind::InvalidData.into());
    Ok(Content {
        root: root.ok_or_else(changed)??,
        entry: 0,
        laid: 0,
    })
}

const INITRAMFS: &str = "guest's initramfs";

fn open(role: &'static str, path: &Path) -> Result<File, KvmError> {
    File::open(path).map_err(in_file(role, path))
}

fn in_file(role: &'static str, path: &Path) -> impl Fn(io::Error) -> KvmError {
    move |source| KvmError::File {
        role,
        path: path.to_owned(),
        source,
    }
}
