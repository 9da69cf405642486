//! What can go wrong with an image, told to the person who asked for it. A message says what was being done and to what;
//! what the system said is the error's source and stands in no message.

use std::io;
use std::path::PathBuf;

use crate::Digest;

/// Every failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that names no image.
    #[error("{reference:?} is not an image reference: {reason}")]
    InvalidReference {
        /// The text, shortened.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A well-formed name of an image in a registry.
    #[error(
        "cannot use image {0:?}: images from registries are not supported; \
         give oci:DIR[:TAG], docker-archive:FILE[:REF] or rootfs:DIR"
    )]
    RegistryUnsupported(String),

    /// Nothing is where the reference points.
    #[error("no image at {}", path.display())]
    NoSuchImage {
        /// The layout's directory, the archive or the root directory.
        path: PathBuf,
        /// Why it cannot be opened.
        source: io::Error,
    },

    /// Something else than the announced kind of image is where the reference points.
    #[error("{} is not {kind}: {reason}", path.display())]
    WrongKind {
        /// What was looked at.
        path: PathBuf,
        /// What it should have been, with an article.
        kind: &'static str,
        /// How one can tell.
        reason: String,
    },

    /// The image has no such tag.
    #[error("{} has no image {name:?}; it has {available}", path.display())]
    NoSuchName {
        /// The layout or archive.
        path: PathBuf,
        /// The tag that was asked for.
        name: String,
        /// The tags there are, for a person.
        available: String,
    },

    /// No tag was given, or one that several images bear, and there is more than one image.
    #[error("{} holds several images; name one of them: {available}", path.display())]
    Ambiguous {
        /// The layout or archive.
        path: PathBuf,
        /// The tags there are, for a person.
        available: String,
    },

    /// The image is made for other machines.
    #[error("{} has no image for {wanted}, only for {available}", path.display())]
    WrongPlatform {
        /// The layout or archive.
        path: PathBuf,
        /// This host's platform, `os/architecture`.
        wanted: String,
        /// The image's platforms, for a person.
        available: String,
    },

    /// A blob that is referred to is not there.
    #[error("{what} is missing: there is no {}; copy the image again", path.display())]
    MissingBlob {
        /// Which blob.
        what: String,
        /// Where it should be.
        path: PathBuf,
        /// Why it cannot be opened.
        source: io::Error,
    },

    /// A document that does not say what it must, or says what it must not.
    #[error("{what} in {} is not valid: {reason}", path.display())]
    Malformed {
        /// Which document.
        what: String,
        /// The file that holds it.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// More of something than is accepted.
    #[error("{what} in {} is too large: {size}, and at most {limit} is accepted", path.display())]
    TooLarge {
        /// What is too large.
        what: String,
        /// The file that holds it.
        path: PathBuf,
        /// How large it is.
        size: u64,
        /// How large it may be.
        limit: u64,
    },

    /// Content that is not what its digest promises.
    #[error("{what} in {} is damaged: its digest is {actual}, not {expected}; copy the image again", path.display())]
    WrongDigest {
        /// Which blob.
        what: String,
        /// The file that holds it.
        path: PathBuf,
        /// The digest it is known by.
        expected: Digest,
        /// The digest of what is there.
        actual: Digest,
    },

    /// A blob that is longer or shorter than its descriptor says.
    #[error("{what} in {} is damaged: it has {actual} bytes, not {expected}; copy the image again", path.display())]
    WrongSize {
        /// Which blob.
        what: String,
        /// The file that holds it.
        path: PathBuf,
        /// Bytes promised.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },

    /// A media type that is not one of an image's.
    #[error("{what} in {} has the media type {media_type:?}, which is not supported; {expected}", path.display())]
    UnsupportedMediaType {
        /// Which blob.
        what: String,
        /// The file that holds it.
        path: PathBuf,
        /// Its media type.
        media_type: String,
        /// What would be supported.
        expected: &'static str,
    },

    /// A layer that cannot be unpacked.
    #[error("cannot unpack layer {layer} of {}", path.display())]
    Layer {
        /// The layer's diff ID.
        layer: Digest,
        /// The file that holds it.
        path: PathBuf,
        /// Why.
        source: LayerError,
    },

    /// The data directory has no room.
    #[error("no space left in {} while unpacking layer {layer}; free some, or use another data directory", dir.display())]
    NoSpace {
        /// The layer's diff ID.
        layer: Digest,
        /// The data directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The data directory cannot be used.
    #[error("cannot {action} {}; give a data directory that is writable for root", path.display())]
    DataDir {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// A root filesystem that cannot be mounted or unmounted.
    #[error("cannot {action} at {}{hint}", target.display())]
    Mount {
        /// What was being done.
        action: &'static str,
        /// The mount point.
        target: PathBuf,
        /// What to do about it, beginning with a separator, or nothing.
        hint: String,
        /// What the system said.
        source: io::Error,
    },

    /// A user or group that the root filesystem does not know.
    #[error("no {kind} {name:?} in the image: {reason}")]
    NoSuchUser {
        /// `user` or `group`.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// How one can tell.
        reason: &'static str,
    },

    /// Anything else the system refuses.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The bytes are not of the announced compression.
    #[error("it is said to be {declared}, but its first bytes are those of {found}")]
    Compression {
        /// By the media type.
        declared: &'static str,
        /// By the magic number.
        found: &'static str,
    },

    /// The stream ends early, or is no gzip, zstd or tar.
    #[error("its data is broken")]
    Read(#[source] io::Error),

    /// A tar header that is not one, or that lies.
    #[error("its tar archive is broken: {0}")]
    Archive(String),

    /// An entry that would leave the layer or that no layer may have.
    #[error("entry {entry:?} is refused: {reason}")]
    Refused {
        /// The entry's name, shortened.
        entry: String,
        /// Why.
        reason: String,
    },

    /// The system does not let an entry be made.
    #[error("cannot {action} {entry:?}")]
    Write {
        /// What was being done.
        action: &'static str,
        /// The entry's name, shortened.
        entry: String,
        /// What the system said.
        source: io::Error,
    },

    /// More of something than is accepted.
    #[error("it has more than {limit} {what}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much is accepted.
        limit: u64,
    },

    /// The unpacked content is not what the image's configuration promises.
    #[error(
        "it unpacks to {actual}, not to what the image's configuration names; build or copy the image again"
    )]
    WrongDiffId {
        /// The digest of the uncompressed archive.
        actual: Digest,
    },

    /// The blob is not what its descriptor promises.
    #[error("its blob's digest is {actual}, not {expected}; copy the image again")]
    WrongBlob {
        /// By the manifest.
        expected: Digest,
        /// Of what is there.
        actual: Digest,
    },
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
