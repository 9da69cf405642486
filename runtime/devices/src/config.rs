//! How the guest reads a device's configuration space.

/// Fills `data` from `config` at `offset`; bytes beyond its end read as zero.
pub(crate) fn read(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = config.get(from..).unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
    data[length..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_end_reads_as_zero_wherever_that_is() {
        let config = [1, 2, 3, 4];
        for (offset, expected) in [
            (0, [1, 2, 3]),
            (2, [3, 4, 0]),
            (4, [0; 3]),
            (5, [0; 3]),
            (u64::MAX, [0; 3]),
        ] {
            let mut data = [0xff; 3];
            read(&config, offset, &mut data);
            assert_eq!(data, expected, "{offset}");
        }
    }
}
