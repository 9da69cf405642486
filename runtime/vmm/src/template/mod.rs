//! Starting a guest from a template, which is made first if there is none: a guest without our devices boots, is saved when it is ready,
//! and ends. Whatever is wrong with a template or with its making, a guest starts: it boots. How a guest is saved and loaded is its
//! engine's to know.

mod store;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;

use crate::spec::{Template, VmSpec};
use crate::stop::chain;
use crate::timeline::{Origin, Timeline, monotonic};

use store::Store;

/// The most memory of a guest with a template, MiB: a sixty-fourth of it, the kernel's description of the rest, is in the template.
pub(crate) const MAX_MEMORY_MIB: u32 = 4096;

/// Why there is no template; for the log, since the guest boots then.
pub(crate) type Failed = Box<dyn std::error::Error>;

/// All that a guest's state at its template depends on, beside this program and this boot of the host, whose processor and clock the
/// guest has taken the measure of.
pub(crate) struct Kind<'a> {
    /// Files, of which each counts by its identity and its last change.
    pub(crate) files: Vec<&'a Path>,
    pub(crate) words: Vec<OsString>,
}

/// An engine's guests of one kind.
pub(crate) trait Source {
    type Guest;
    type Error;

    /// Their kind; `None` when such guests have no template.
    fn kind(&self) -> Option<Kind<'_>>;

    /// Has a guest boot, and writes it to `to` when it is ready.
    fn make(&self, template: &Template, to: &File) -> Result<(), Failed>;

    /// Makes another guest of what has been written.
    fn load(&self, from: File) -> Result<Self::Guest, Failed>;

    /// Makes a guest that will boot.
    fn boot(&self) -> Result<Self::Guest, Self::Error>;
}

/// A guest that is about to run.
pub(crate) struct Begun<T> {
    pub(crate) guest: T,
    /// Where it comes from.
    pub(crate) origin: Origin,
    /// When a template had been made for it.
    pub(crate) made: Option<u64>,
}

impl<T> Begun<T> {
    /// What is known of it at the moment at which it is let go, which is now.
    pub(crate) fn timeline(&self) -> Timeline {
        Timeline {
            guest: monotonic(),
            origin: self.origin,
            template: self.made,
            ..Timeline::default()
        }
    }
}

/// Begins the guest of `spec`, from a template if it is to have one.
pub(crate) fn begin<S: Source>(spec: &VmSpec, source: &S) -> Result<Begun<S::Guest>, S::Error> {
    let mut made = None;
    if let Some(template) = &spec.template
        && let Some(kind) = source.kind()
    {
        match from_template(template, &kind, source, &mut made) {
            Ok(guest) => {
                return Ok(Begun {
                    guest,
                    origin: Origin::Template,
                    made,
                });
            }
            Err(error) => tracing::debug!("the guest boots: {}", chain(&*error)),
        }
    }
    Ok(Begun {
        guest: source.boot()?,
        origin: Origin::Boot,
        made,
    })
}

/// What is wrong with the directory of templates.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the directory of templates")]
struct StoreError(#[source] io::Error);

fn from_template<S: Source>(
    template: &Template,
    kind: &Kind<'_>,
    source: &S,
    made: &mut Option<u64>,
) -> Result<S::Guest, Failed> {
    let store = Store::new(&template.dir, kind).map_err(StoreError)?;
    if store.is_given_up() {
        return Err("templates of this kind are of no use on this host".into());
    }
    if let Some(file) = store.find().map_err(StoreError)? {
        match source.load(file) {
            Ok(guest) => return Ok(guest),
            Err(error) => tracing::debug!("the template is of no use: {}", chain(&*error)),
        }
        store.discard().map_err(StoreError)?;
    }
    let staged = store.stage().map_err(StoreError)?;
    source.make(template, &staged.file)?;
    staged.keep().map_err(StoreError)?;
    *made = Some(monotonic());
    let missing = || StoreError(io::ErrorKind::NotFound.into());
    let file = store.find().map_err(StoreError)?.ok_or_else(missing)?;
    let loaded = source.load(file);
    if loaded.is_err() {
        // The next would not be better, and making one takes longer than a boot.
        store.give_up().map_err(StoreError)?;
    }
    loaded
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::io::{Read, Write};

    use super::*;
    use crate::spec::tests::spec;

    /// Guests that are words, and notes of what was done to have them.
    #[derive(Default)]
    struct Words {
        damaged: Cell<bool>,
        /// Those that are made are damaged.
        damages: Cell<bool>,
        cannot_make: bool,
        of_no_kind: bool,
        done: RefCell<Vec<&'static str>>,
    }

    impl Source for Words {
        type Guest = String;
        type Error = io::Error;

        fn kind(&self) -> Option<Kind<'_>> {
            (!self.of_no_kind).then(|| Kind {
                files: Vec::new(),
                words: vec!["words".into()],
            })
        }

        fn make(&self, _: &Template, mut to: &File) -> Result<(), Failed> {
            self.done.borrow_mut().push("made");
            if self.cannot_make {
                return Err("cannot".into());
            }
            self.damaged.set(self.damages.get());
            Ok(to.write_all(b"loaded")?)
        }

        fn load(&self, mut from: File) -> Result<String, Failed> {
            if self.damaged.take() {
                return Err("damaged".into());
            }
            let mut text = String::new();
            from.read_to_string(&mut text)?;
            Ok(text)
        }

        fn boot(&self) -> io::Result<String> {
            Ok("booted".into())
        }
    }

    fn in_dir(dir: &Path) -> VmSpec {
        let template = Template {
            dir: dir.join("templates"),
            word: "wait".into(),
            ready: "ready".into(),
        };
        VmSpec {
            template: Some(template),
            ..spec()
        }
    }

    #[test]
    fn a_template_is_made_once_and_again_when_it_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let (spec, source) = (in_dir(dir.path()), Words::default());
        for (damaged, makes) in [(false, 1), (false, 1), (true, 2), (false, 2)] {
            source.damaged.set(damaged);
            let begun = begin(&spec, &source).unwrap();
            assert_eq!(
                (begun.guest.as_str(), begun.origin),
                ("loaded", Origin::Template)
            );
            assert_eq!(source.done.borrow().len(), makes);
        }
    }

    #[test]
    fn a_kind_whose_fresh_template_is_of_no_use_has_none_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let (spec, source) = (in_dir(dir.path()), Words::default());
        source.damages.set(true);
        for _ in 0..2 {
            let begun = begin(&spec, &source).unwrap();
            assert_eq!(begun.origin, Origin::Boot);
        }
        assert_eq!(*source.done.borrow(), ["made"]);
    }

    #[test]
    fn a_guest_boots_that_is_to_have_no_template_or_can_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let source = Words {
            cannot_make: true,
            ..Words::default()
        };
        for spec in [spec(), in_dir(dir.path())] {
            let begun = begin(&spec, &source).unwrap();
            assert_eq!(
                (begun.guest.as_str(), begun.origin, begun.made),
                ("booted", Origin::Boot, None)
            );
        }
        assert_eq!(*source.done.borrow(), ["made"]);
        let source = Words {
            of_no_kind: true,
            ..Words::default()
        };
        let begun = begin(&in_dir(dir.path()), &source).unwrap();
        assert_eq!(begun.origin, Origin::Boot);
    }
}
