//! A guest that does to its devices what no driver may, with every device the same. What a device has been through must not
//! panic, not go on for ever, not take more memory than there are buffers, and not matter after a reset. A test is an attack on a
//! device: `blk::a_descriptor_that_names_itself`. Lies in a device's own language, which need more words, are tested beside
//! the devices.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a failure here fails the test"
)]

mod attacks;
mod harness;
mod heap;
mod subjects;
mod threads;

macro_rules! tests {
    ($harness:ident, $subject:path, $($module:ident::$attack:ident)*) => {
        $(#[test]
        fn $attack() {
            $harness::run($subject, $module::$attack);
        })*
    };
}

/// A module for each device with a test for each attack.
macro_rules! devices {
    ($($device:ident)*) => {
        $(mod $device {
            use super::{attacks, harness, subjects, threads};
            tests! { harness, subjects::$device,
                attacks::a_descriptor_that_names_itself
                attacks::descriptors_in_a_ring
                attacks::a_next_beyond_the_table
                attacks::a_chain_as_long_as_the_table
                attacks::buffers_of_no_length
                attacks::buffers_of_four_gibibytes
                attacks::very_many_buffers_of_much_memory
                attacks::an_address_and_length_beyond_all_addresses
                attacks::buffers_in_a_hole
                attacks::buffers_that_end_beyond_memory
                attacks::buffers_over_a_border_of_mappings
                attacks::buffers_over_the_descriptor_table
                attacks::buffers_over_the_available_ring
                attacks::buffers_over_the_used_ring
                attacks::nothing_to_write
                attacks::nothing_to_read
                attacks::answers_before_questions
                attacks::directions_that_alternate
                attacks::every_flag_at_once
                attacks::indirect_tables_of_odd_sizes
                attacks::indirect_tables_that_are_not_there
                attacks::indirect_tables_in_indirect_tables
                attacks::indirect_tables_in_the_middle_of_a_chain
                attacks::indirect_tables_that_loop
                attacks::an_indirect_table_of_itself
                attacks::indirect_tables_without_end
                attacks::an_available_index_far_ahead
                attacks::an_available_index_that_goes_back
                attacks::heads_beyond_the_table
                attacks::one_head_offered_many_times
                attacks::rings_that_are_not_in_memory
                attacks::rings_over_one_another
                attacks::queues_that_are_not_there
                attacks::queues_that_are_not_ready
                attacks::a_storm_of_notifications
                attacks::a_storm_of_host_events
                attacks::a_storm_of_resets
                attacks::a_reset_with_work_to_do
                attacks::configuration_read_everywhere
                attacks::configuration_written_everywhere
                attacks::features_that_were_not_offered
                attacks::requests_cut_off_anywhere
                attacks::requests_with_every_field_at_its_extremes
                attacks::answers_with_too_little_room
                attacks::a_flood_of_requests
                attacks::a_flood_of_requests_whose_answers_nobody_takes
                attacks::rubbish
                threads::descriptors_rewritten_while_they_are_read
                threads::indices_rewritten_while_they_are_read
                threads::requests_rewritten_while_they_are_read
            }
        })*
    };
}

devices! { balloon blk console fs mem net pmem rng vsock }
