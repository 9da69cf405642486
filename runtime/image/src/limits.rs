//! What an image may ask of the host, in numbers. A limit stands here rather than beside a type when several modules
//! enforce it; each is far above what image builders produce and far below what would hurt.

/// Longest manifest, index or configuration read, bytes: the size up to which the OCI distribution specification asks
/// registries to accept a manifest.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// Most layers in one image. The kernel's overlayfs stacks at most 500 directories (`OVL_MAX_STACK`), and one of them is
/// kept for the directory attributes of [`crate::store`].
pub const MAX_LAYERS: usize = 499;

/// Longest path inside an image, bytes: the kernel's `PATH_MAX` without its terminator.
pub const MAX_PATH: usize = 4095;

/// Deepest directory nesting in a layer.
pub const MAX_DEPTH: usize = 512;
