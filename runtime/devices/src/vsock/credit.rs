//! Credit, the flow control of a vsock stream (virtio 1.3 §5.10.6.3), as two counters that know no packets. What the guest
//! says is checked here; what we say is made here.

use super::packet::MAX_PAYLOAD;

/// Bytes of one stream that may wait in our memory for a slow host descriptor, and so the `buf_alloc` we announce. It is
/// the whole of what a guest can make one connection hold.
pub(super) const STREAM_BUFFER: u32 = 256 << 10;

/// Most of the guest's credit that is honoured, in bytes: far more than any guest grants, and small enough that the
/// counters' differences always tell ahead from behind.
const MAX_GUEST_BUFFER: u32 = 1 << 30;

/// What may still be sent to the guest on one stream.
#[derive(Debug, Default)]
pub(super) struct ToGuest {
    /// The guest's latest `buf_alloc`, at most [`MAX_GUEST_BUFFER`].
    buf_alloc: u32,
    /// Bytes sent that the guest's user has not taken yet; never above [`MAX_GUEST_BUFFER`], since nothing is sent beyond.
    in_flight: u32,
    /// Bytes sent, modulo 2^32.
    sent: u32,
}

/// The guest says it has taken bytes it was never sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Forged;

impl ToGuest {
    /// Takes in what a packet of the guest's says.
    ///
    /// A `fwd_cnt` behind an earlier one is no lie: a driver takes the counter's value when it makes a packet, and two
    /// packets can change places before they are in the ring. It says nothing, though.
    ///
    /// # Errors
    /// [`Forged`] when `fwd_cnt` is ahead of what was sent.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), Forged> {
        let in_flight = self.sent.wrapping_sub(fwd_cnt);
        if in_flight > u32::MAX / 2 {
            return Err(Forged);
        }
        self.in_flight = self.in_flight.min(in_flight);
        self.buf_alloc = buf_alloc.min(MAX_GUEST_BUFFER);
        Ok(())
    }

    /// Bytes that may be sent. Zero when the guest has made its buffer smaller than what is on its way.
    pub(super) fn available(&self) -> usize {
        self.buf_alloc.saturating_sub(self.in_flight) as usize
    }

    /// `count` bytes, at most [`ToGuest::available`], have been sent.
    pub(super) fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
        self.in_flight = self.in_flight.saturating_add(count);
    }
}

/// What the guest may still send on one stream.
#[derive(Debug, Default)]
pub(super) struct FromGuest {
    /// Bytes received, modulo 2^32.
    received: u32,
    /// Bytes that have left us for the host, modulo 2^32.
    forwarded: u32,
    /// The value of `forwarded` the guest was last told.
    announced: u32,
}

/// The guest has sent more than it was given credit for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

impl FromGuest {
    /// `count` bytes, at most [`MAX_PAYLOAD`], have come in.
    ///
    /// # Errors
    /// [`Overrun`] when the guest had no credit for them, as far as it has been told. What has been forwarded is never
    /// behind what was announced, so without this error at most [`STREAM_BUFFER`] bytes wait.
    pub(super) fn receive(&mut self, count: u32) -> Result<(), Overrun> {
        let outstanding = self.received.wrapping_sub(self.announced);
        if count > STREAM_BUFFER - outstanding.min(STREAM_BUFFER) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(count);
        Ok(())
    }

    /// `count` received bytes have left for the host.
    pub(super) fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// Every received byte has left, or was dropped because nobody wants it.
    pub(super) fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// The `fwd_cnt` to put into a packet that is about to be sent.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }

    /// Whether the guest should be told of what it does not know yet. It should as soon as it cannot be sure of the room
    /// for one packet of the largest size beside another one under way.
    pub(super) fn wants_update(&self) -> bool {
        let unknown = self.forwarded.wrapping_sub(self.announced);
        let known_room = STREAM_BUFFER
            - self
                .received
                .wrapping_sub(self.announced)
                .min(STREAM_BUFFER);
        unknown > 0 && (known_room as usize) < 2 * MAX_PAYLOAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_may_be_sent_before_the_guest_grants_room() {
        assert_eq!(ToGuest::default().available(), 0);
    }

    #[test]
    fn what_is_sent_comes_off_and_what_the_guest_takes_comes_back() {
        let mut credit = ToGuest::default();
        credit.update(1000, 0).unwrap();
        credit.send(600);
        assert_eq!(credit.available(), 400);
        credit.update(1000, 500).unwrap();
        assert_eq!(credit.available(), 900);
    }

    #[test]
    fn the_counters_wrap() {
        let mut credit = ToGuest::default();
        let mut fwd = 0u32;
        for _ in 0..10_000 {
            credit.update(1 << 20, fwd).unwrap();
            assert_eq!(credit.available(), 1 << 20);
            credit.send(1 << 20);
            assert_eq!(credit.available(), 0);
            fwd = fwd.wrapping_add(1 << 20);
        }
    }

    #[test]
    fn taking_bytes_that_were_never_sent_is_a_lie() {
        let mut credit = ToGuest::default();
        assert_eq!(credit.update(1000, 1), Err(Forged));
        credit.update(1000, 0).unwrap();
        credit.send(10);
        assert_eq!(credit.update(1000, 11), Err(Forged));
        assert_eq!(credit.update(1000, 10), Ok(()));
    }

    #[test]
    fn an_older_count_takes_nothing_back_and_gives_nothing() {
        let mut credit = ToGuest::default();
        credit.update(1000, 0).unwrap();
        credit.send(800);
        credit.update(1000, 800).unwrap();
        credit.update(1000, 300).unwrap();
        assert_eq!(credit.available(), 1000);
        credit.update(1000, 0u32.wrapping_sub(5)).unwrap();
        assert_eq!(credit.available(), 1000);
    }

    #[test]
    fn a_buffer_made_smaller_than_what_is_on_its_way_gives_no_credit() {
        let mut credit = ToGuest::default();
        credit.update(1000, 0).unwrap();
        credit.send(800);
        credit.update(100, 0).unwrap();
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn an_endless_buffer_is_honoured_only_so_far() {
        let mut credit = ToGuest::default();
        credit.update(u32::MAX, 0).unwrap();
        assert_eq!(credit.available(), 1 << 30);
        credit.send(1 << 30);
        credit.update(u32::MAX, 0).unwrap();
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_guest_may_send_the_whole_buffer_and_not_a_byte_more() {
        let mut credit = FromGuest::default();
        for _ in 0..STREAM_BUFFER / 1024 {
            credit.receive(1024).unwrap();
        }
        assert_eq!(credit.receive(1), Err(Overrun));
        assert_eq!(credit.receive(0), Ok(()));
    }

    #[test]
    fn room_the_guest_was_not_told_of_is_not_its_to_use() {
        let mut credit = FromGuest::default();
        credit.receive(STREAM_BUFFER).unwrap();
        credit.forward(STREAM_BUFFER);
        assert_eq!(credit.receive(1), Err(Overrun));
        assert!(credit.wants_update());
        assert_eq!(credit.announce(), STREAM_BUFFER);
        assert!(!credit.wants_update());
        credit.receive(STREAM_BUFFER).unwrap();
    }

    #[test]
    fn an_overrun_of_any_size_is_seen() {
        let mut credit = FromGuest::default();
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
        credit.receive(10).unwrap();
        assert_eq!(credit.receive(u32::MAX - 5), Err(Overrun));
    }
}
