//! The suite that makes a store a provider: every claim of the port as a test by its own name.
//!
//! A provider's test module is a [`Fixture`] and one line, `conformance_tests!(fixture)`, with an expression for a fresh
//! one. What a store cannot do is printed as skipped, with the reason. How a store does things is not looked at: only
//! the port is called.

mod documents;
mod leasing;
mod operating;
mod publishing;
mod reading;
mod routing;
mod scene;
mod settling;
mod walk;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use self::scene::Scene;
use crate::provider::Provider;
use crate::provider::inbox::InboxRow;

/// A place for one store.
#[async_trait]
pub trait Fixture: Send + Sync + 'static {
    /// Opens the store: a fresh one at first, and the same again after it was closed.
    async fn open(&self) -> Arc<dyn Provider>;

    /// Whether the store can be opened again.
    ///
    /// # Errors
    /// Why it cannot.
    fn reopens(&self) -> Result<(), &'static str>;

    /// Moves the store's clock.
    async fn advance(&self, by: Duration);

    /// Leaves rows in the store's inbox, as others would. Their positions are the store's business.
    ///
    /// # Errors
    /// Why nobody can.
    async fn leave(&self, _rows: &[InboxRow]) -> Result<(), &'static str> {
        Err("the store has no inbox")
    }
}

macro_rules! claims {
    ($($theme:ident: $($claim:ident,)+;)+) => {
        /// Every claim, as a function over a [`Scene`].
        pub mod claims {
            $($(pub use super::$theme::$claim;)+)+
        }

        /// Expands to one `#[tokio::test]` per claim, each on the fixture that the expression gives.
        #[macro_export]
        macro_rules! conformance_tests {
            ($fixture:expr) => {
                $($(
                    #[tokio::test]
                    async fn $claim() {
                        let scene = $crate::provider::conformance::Scene::open($fixture).await;
                        $crate::provider::conformance::claims::$claim(scene).await;
                    }
                )+)+
            };
        }
    };
}

claims! {
    publishing:
        seq_is_dense_under_many_publishers,
        an_id_is_stored_once_whoever_sends_it_again,
        an_id_sent_by_many_at_once_is_stored_once,
        an_id_twice_in_one_batch_is_stored_once,
        a_duplicate_answers_with_the_status_of_the_first,
        an_event_for_nobody_is_completed_at_once,
        an_event_comes_back_as_it_was_sent,
        hostile_texts_are_only_texts,
        binary_payloads_keep_every_byte,
        numbers_keep_their_spelling,
        a_payload_of_a_mebibyte_fits,
        an_empty_batch_is_fine,
    ;
    leasing:
        no_delivery_is_leased_twice_at_once,
        two_instances_share_seq_and_never_lease_a_delivery_twice,
        the_oldest_come_first_and_room_is_kept_for_each_subscription,
        an_expired_lease_goes_to_the_next_claim_as_lost,
        a_claim_says_when_to_come_back,
        renewing_keeps_a_lease_and_refuses_a_stale_one,
        the_fourth_lost_lease_makes_a_dead_letter,
        a_released_delivery_is_as_if_never_claimed,
        a_failing_head_blocks_its_key_only,
        events_without_a_key_are_not_ordered,
        keys_of_different_subscriptions_do_not_wait_for_each_other,
        a_dead_or_expired_head_lets_its_key_go_on,
        a_subscription_nobody_claims_waits,
    ;
    settling:
        a_success_completes_delivery_and_event,
        an_event_is_failed_only_when_nothing_is_open,
        a_retry_becomes_due_after_exactly_its_delay,
        attempts_are_numbered_and_counted_by_who_is_to_blame,
        a_refusal_is_a_dead_letter_at_once,
        a_stale_token_changes_nothing,
        each_settlement_of_a_mixed_batch_counts_by_itself,
        a_stale_token_among_many_of_a_claim_changes_nothing,
        a_lease_taken_away_cannot_be_settled,
        one_settlement_closes_an_event,
        the_settlement_that_closes_an_event_is_told_how_it_ended,
        an_event_that_is_closed_again_ends_by_all_of_its_deliveries,
        each_settlement_of_a_batch_stands_for_itself,
        what_a_success_publishes_and_writes_commits_with_it,
        published_events_are_idempotent_by_id,
        increments_at_once_lose_nothing,
        a_write_that_cannot_be_applied_changes_nothing,
        writes_of_one_success_see_each_other,
        what_a_failure_would_write_is_not_written,
        an_attempt_comes_back_as_it_was_recorded,
    ;
    reading:
        the_log_is_read_in_pages_without_gaps,
        a_reader_passes_over_erased_events,
        lists_are_newest_first_and_paging_is_complete,
        paging_is_stable_while_events_come_in,
        every_filter_works_alone_and_with_others,
        filters_by_status_follow_the_deliveries,
        dead_letters_are_filtered_and_paged,
    ;
    operating:
        a_redriven_letter_has_fresh_budgets_and_old_attempts,
        a_redrive_changes_what_its_filter_means_only,
        a_replay_delivers_a_stretch_again,
        a_replay_of_what_is_missing_leaves_the_rest,
        a_dry_run_changes_nothing,
        a_cancelled_subscription_has_no_open_deliveries,
        an_erased_event_is_gone_but_its_id_and_seq_stay_used,
        pruning_by_age_never_removes_open_work,
        pruning_by_count_removes_the_oldest_finished_events,
        an_erased_id_is_forgotten_with_its_age,
        seq_goes_on_after_everything_was_pruned,
        what_was_stored_is_there_after_reopening,
        a_change_ticks_whoever_waits,
        closing_leaves_no_call_hanging,
        a_closed_store_answers_stopped,
    ;
    routing:
        an_inbox_that_is_empty_or_absent_gives_nothing,
        what_others_left_is_moved_in_order_with_its_deliveries,
        what_a_row_says_reaches_the_event,
        a_row_that_cannot_become_an_event_holds_nobody_up,
        an_id_of_the_inbox_that_the_log_has_is_a_duplicate,
        rows_that_many_route_at_once_are_moved_once,
    ;
    documents:
        a_document_changes_only_as_expected,
        one_of_many_writers_wins_each_revision,
        a_document_with_a_ttl_expires,
        documents_are_listed_in_byte_order_and_in_pages,
        documents_hold_any_bytes_under_any_name,
        a_revision_is_never_given_out_twice,
    ;
    walk:
        figures_add_up_after_a_random_walk,
        a_random_walk_ends_where_the_reference_ends,
    ;
}
