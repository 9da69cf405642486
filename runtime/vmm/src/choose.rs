//! Which engine a VM gets: what the user asked for, or the best that works on this host. The choice is made before a VM
//! process exists, and always comes with the reason, so that nobody runs on the slower engine without being told.

use std::str::FromStr;

use crate::probe::{self, Probed};
use crate::spec::Engine;

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where it works, else the software engine.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// The software engine, whatever the host can do.
    Software,
}

/// The word is none of `auto`, `kvm`, `software`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown engine {0:?}: choose auto, kvm or software")]
pub struct UnknownEngine(String);

impl FromStr for EngineChoice {
    type Err = UnknownEngine;

    fn from_str(word: &str) -> Result<Self, UnknownEngine> {
        match word {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "software" => Ok(Self::Software),
            other => Err(UnknownEngine(other.to_owned())),
        }
    }
}

/// KVM was asked for and does not work.
#[derive(Debug, thiserror::Error)]
#[error(
    "the kvm engine does not work on this host: {why} (`--engine software` runs anywhere, more slowly)"
)]
pub struct NoKvm {
    why: String,
}

/// The engine that a VM gets.
#[derive(Debug)]
pub struct Chosen {
    /// The engine.
    pub engine: Engine,
    /// Why it is this one, in one line for people.
    pub reason: String,
    /// What is left of finding out.
    pub probed: Option<Probed>,
}

/// Resolves `choice` on this host.
///
/// # Errors
/// [`NoKvm`] when KVM was asked for by name and does not work here.
pub fn choose(choice: EngineChoice) -> Result<Chosen, NoKvm> {
    let kvm = || probe::kvm().map_err(|failure| failure.to_string());
    let (engine, reason, probed) = resolve(choice, kvm)?;
    Ok(Chosen {
        engine,
        reason,
        probed,
    })
}

/// `kvm` finds out whether the KVM engine can run a guest here; if not, why.
fn resolve<T>(
    choice: EngineChoice,
    kvm: impl FnOnce() -> Result<T, String>,
) -> Result<(Engine, String, Option<T>), NoKvm> {
    match choice {
        EngineChoice::Software => {
            let reason = "the software engine was asked for".into();
            Ok((Engine::Software, reason, None))
        }
        EngineChoice::Kvm => match kvm() {
            Ok(probed) => {
                let reason = "the kvm engine was asked for".into();
                Ok((Engine::Kvm, reason, Some(probed)))
            }
            Err(why) => Err(NoKvm { why }),
        },
        EngineChoice::Auto => match kvm() {
            Ok(probed) => Ok((Engine::Kvm, "KVM works on this host".into(), Some(probed))),
            Err(why) => {
                let reason = format!("using the software engine, which is slower: {why}");
                Ok((Engine::Software, reason, None))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> Result<(), String> {
        Err("no /dev/kvm".into())
    }

    #[test]
    fn auto_takes_kvm_where_it_works() {
        let (engine, ..) = resolve(EngineChoice::Auto, || Ok(())).unwrap();
        assert_eq!(engine, Engine::Kvm);
    }

    #[test]
    fn auto_takes_the_software_engine_elsewhere_and_says_why() {
        let (engine, why, _) = resolve(EngineChoice::Auto, broken).unwrap();
        assert_eq!(engine, Engine::Software);
        assert!(why.contains("no /dev/kvm"), "{why}");
    }

    #[test]
    fn kvm_by_name_never_becomes_something_else() {
        let error = resolve(EngineChoice::Kvm, broken).unwrap_err();
        assert!(error.to_string().contains("no /dev/kvm"), "{error}");
    }

    #[test]
    fn software_by_name_does_not_even_look_at_kvm() {
        let looked = || -> Result<(), String> { panic!("probed") };
        let (engine, ..) = resolve(EngineChoice::Software, looked).unwrap();
        assert_eq!(engine, Engine::Software);
    }

    #[test]
    fn only_the_three_words_are_engines() {
        assert_eq!("kvm".parse(), Ok(EngineChoice::Kvm));
        assert!("KVM".parse::<EngineChoice>().is_err());
        assert!("".parse::<EngineChoice>().is_err());
    }
}
