//! Names as they come from the guest. The host resolves one component at a time, relative to a directory it already holds.

use std::ffi::CStr;
use std::io;

use rustix::io::Errno;

/// A single directory entry's name: not empty, no slash, not `.` or `..`. What the kernel does with such a name stays
/// inside the directory it is used in, as long as it is told not to follow a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// EINVAL: a guest kernel resolves paths, `.` and `..` itself and never sends them.
    pub fn new(name: &'a CStr) -> io::Result<Self> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL.into()),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
            _ => Ok(Self(name)),
        }
    }

    /// The name, for a system call.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_one_component_is_accepted() {
        for name in [c"a", c"...", c".a", c"a.", c"..a", c" ", c"\xff\n"] {
            assert_eq!(Name::new(name).unwrap().as_c_str(), name);
        }
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in [
            c"", c".", c"..", c"/", c"a/b", c"../x", c"/etc", c"a/", c"./",
        ] {
            assert_eq!(
                Name::new(name).unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{name:?}"
            );
        }
    }
}
