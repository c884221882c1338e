//! The retry policy: which verdict leads where, and after how long.
//!
//! Pure arithmetic: time and chance come in as parameters, and nothing overflows, whatever the numbers.

use std::time::Duration;

use jiff::fmt::serde::unsigned_duration::friendly::compact as friendly;
use serde::{Deserialize, Serialize};

use crate::delivery::{INFRA_BUDGET, Next, Verdict};
use crate::error::{Error, Result};

/// How often, how fast and for how long a delivery is attempted again.
///
/// The delay before retry k is min(`initial_delay` · `backoff_factor`^(k−1), `max_delay`), with a share of up to `jitter` added or taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    /// Retries after the first attempt; 0 for none.
    pub max_retries: u32,
    /// The delay before the first retry.
    #[serde(with = "friendly::required")]
    pub initial_delay: Duration,
    /// The longest delay, before jitter.
    #[serde(with = "friendly::required")]
    pub max_delay: Duration,
    /// What each delay is multiplied by for the next; at least 1.
    pub backoff_factor: f64,
    /// The largest share of a delay that chance adds or takes, from 0 to 1.
    pub jitter: f64,
    /// An event older than this is not attempted again.
    #[serde(with = "friendly::required")]
    pub max_age: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_retries: 3,
            initial_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(30),
            backoff_factor: 2.0,
            jitter: 0.1,
            max_age: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// What is known when an attempt has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// How it ended.
    pub verdict: Verdict,
    /// Which of the handler's attempts it was, 1 for the first; lost ones and host faults do not count.
    pub attempt: u32,
    /// How many attempts were lost to faults that are not the handler's, this one included.
    pub infra_faults: u32,
    /// The event's age by the store's clock.
    pub age: Duration,
    /// The delay that the handler asked for.
    pub after: Option<Duration>,
    /// A number from 0 (included) to 1 (excluded), drawn for this decision.
    pub roll: f64,
}

impl RetryPolicy {
    /// What becomes of a delivery whose attempt has ended so.
    #[must_use]
    pub fn next(&self, ended: &Ended) -> Next {
        let allowed = match ended.verdict {
            Verdict::Ok => return Next::Complete,
            Verdict::Reject | Verdict::OutOfFuel | Verdict::OutOfMemory | Verdict::Denied => false,
            Verdict::Retry | Verdict::Trap | Verdict::Timeout => ended.attempt <= self.max_retries,
            Verdict::HostFault | Verdict::Lost => ended.infra_faults <= INFRA_BUDGET,
        };
        let retry = if ended.verdict.is_infra() { ended.infra_faults } else { ended.attempt };
        let after = ended.after.unwrap_or_else(|| self.jittered(self.delay(retry), ended.roll));
        if allowed && ended.age.saturating_add(after) <= self.max_age { Next::Retry { after } } else { Next::Fail }
    }

    /// The delay before retry `retry` (1 for the first), without jitter.
    #[must_use]
    pub fn delay(&self, retry: u32) -> Duration {
        let exponent = i32::try_from(retry.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.initial_delay.as_secs_f64() * self.backoff_factor.powi(exponent);
        // Infinity, and 0·∞ = NaN, are both "longer than any bound", except that nothing times anything stays nothing.
        match Duration::try_from_secs_f64(seconds) {
            _ if self.initial_delay.is_zero() => Duration::ZERO,
            Ok(delay) => delay.min(self.max_delay),
            Err(_) => self.max_delay,
        }
    }

    fn jittered(&self, delay: Duration, roll: f64) -> Duration {
        let share = 1.0 + self.jitter * (2.0 * roll - 1.0);
        Duration::try_from_secs_f64(delay.as_secs_f64() * share).unwrap_or(delay)
    }

    /// The most attempts that a handler gets.
    #[must_use]
    pub fn max_attempts(&self) -> u32 {
        self.max_retries.saturating_add(1)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the field below `retry`.
    pub fn validate(&self) -> Result<()> {
        if !self.backoff_factor.is_finite() || self.backoff_factor < 1.0 {
            let value = self.backoff_factor.to_string();
            return Err(Error::invalid("retry.backoff_factor", value, "must be a finite number of at least 1"));
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            return Err(Error::invalid("retry.jitter", self.jitter.to_string(), "must be from 0 to 1"));
        }
        if self.max_delay < self.initial_delay {
            let value = format!("{:?}", self.max_delay);
            return Err(Error::invalid("retry.max_delay", value, "must not be shorter than retry.initial_delay"));
        }
        Ok(())
    }
}

/// The parts of a policy that somebody chose; the rest comes from the next level up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryOverrides {
    /// See [`RetryPolicy::max_retries`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
    /// See [`RetryPolicy::initial_delay`].
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub initial_delay: Option<Duration>,
    /// See [`RetryPolicy::max_delay`].
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub max_delay: Option<Duration>,
    /// See [`RetryPolicy::backoff_factor`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff_factor: Option<f64>,
    /// See [`RetryPolicy::jitter`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<f64>,
    /// See [`RetryPolicy::max_age`].
    #[serde(default, skip_serializing_if = "Option::is_none", with = "friendly::optional")]
    pub max_age: Option<Duration>,
}

impl RetryOverrides {
    /// These choices, and `lower`'s where there is none.
    #[must_use]
    pub fn or(&self, lower: &Self) -> Self {
        Self {
            max_retries: self.max_retries.or(lower.max_retries),
            initial_delay: self.initial_delay.or(lower.initial_delay),
            max_delay: self.max_delay.or(lower.max_delay),
            backoff_factor: self.backoff_factor.or(lower.backoff_factor),
            jitter: self.jitter.or(lower.jitter),
            max_age: self.max_age.or(lower.max_age),
        }
    }

    /// The policy, with `defaults` where nothing was chosen.
    #[must_use]
    pub fn resolve(&self, defaults: &RetryPolicy) -> RetryPolicy {
        RetryPolicy {
            max_retries: self.max_retries.unwrap_or(defaults.max_retries),
            initial_delay: self.initial_delay.unwrap_or(defaults.initial_delay),
            max_delay: self.max_delay.unwrap_or(defaults.max_delay),
            backoff_factor: self.backoff_factor.unwrap_or(defaults.backoff_factor),
            jitter: self.jitter.unwrap_or(defaults.jitter),
            max_age: self.max_age.unwrap_or(defaults.max_age),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ended(verdict: Verdict, attempt: u32) -> Ended {
        Ended { verdict, attempt, infra_faults: 0, age: Duration::ZERO, after: None, roll: 0.5 }
    }

    /// BEHAVIOURS D2.
    #[test]
    fn the_default_delays_are_one_two_and_four_seconds() {
        let policy = RetryPolicy::default();
        let delays: Vec<u64> = (1..=7).map(|retry| policy.delay(retry).as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30]);
    }

    /// BEHAVIOURS D3: max_retries + 1 calls.
    #[test]
    fn the_fourth_failure_of_the_default_policy_is_the_last() {
        let policy = RetryPolicy::default();
        for attempt in 1..=3 {
            assert!(matches!(policy.next(&ended(Verdict::Retry, attempt)), Next::Retry { .. }), "{attempt}");
        }
        assert_eq!(policy.next(&ended(Verdict::Retry, 4)), Next::Fail);
        let none = RetryPolicy { max_retries: 0, ..RetryPolicy::default() };
        assert_eq!(none.next(&ended(Verdict::Trap, 1)), Next::Fail);
    }

    /// DESIGN §4.
    #[test]
    fn every_verdict_has_its_default() {
        let policy = RetryPolicy::default();
        for verdict in Verdict::ALL {
            let next = policy.next(&ended(verdict, 1));
            let expected = match verdict {
                Verdict::Ok => matches!(next, Next::Complete),
                Verdict::Reject | Verdict::OutOfFuel | Verdict::OutOfMemory | Verdict::Denied => next == Next::Fail,
                _ => matches!(next, Next::Retry { .. }),
            };
            assert!(expected, "{verdict}: {next:?}");
        }
    }

    #[test]
    fn lost_leases_have_a_budget_of_their_own() {
        let policy = RetryPolicy { max_retries: 0, ..RetryPolicy::default() };
        for infra_faults in 1..=3 {
            let lost = Ended { infra_faults, ..ended(Verdict::Lost, 1) };
            assert!(matches!(policy.next(&lost), Next::Retry { .. }), "{infra_faults}");
        }
        assert_eq!(policy.next(&Ended { infra_faults: 4, ..ended(Verdict::Lost, 1) }), Next::Fail);
    }

    #[test]
    fn the_handlers_own_delay_wins_within_the_age_bound() {
        let policy = RetryPolicy::default();
        let asks = Ended { after: Some(Duration::from_millis(70)), ..ended(Verdict::Retry, 1) };
        assert_eq!(policy.next(&asks), Next::Retry { after: Duration::from_millis(70) });
        let too_long = Ended { after: Some(Duration::from_secs(90_000)), ..ended(Verdict::Retry, 1) };
        assert_eq!(policy.next(&too_long), Next::Fail);
        let old = Ended { age: policy.max_age, ..ended(Verdict::Retry, 1) };
        assert_eq!(policy.next(&old), Next::Fail);
    }

    #[test]
    fn a_policy_with_impossible_numbers_is_refused_by_field() {
        let rows = [
            (RetryPolicy { backoff_factor: 0.5, ..RetryPolicy::default() }, "retry.backoff_factor"),
            (RetryPolicy { backoff_factor: f64::NAN, ..RetryPolicy::default() }, "retry.backoff_factor"),
            (RetryPolicy { jitter: 1.5, ..RetryPolicy::default() }, "retry.jitter"),
            (RetryPolicy { max_delay: Duration::ZERO, ..RetryPolicy::default() }, "retry.max_delay"),
        ];
        for (policy, field) in rows {
            assert!(policy.validate().unwrap_err().to_string().starts_with(field));
        }
    }

    #[test]
    fn overrides_win_field_by_field() {
        let plugin = RetryOverrides { max_retries: Some(7), jitter: Some(0.0), ..RetryOverrides::default() };
        let subscription = RetryOverrides { max_retries: Some(1), ..RetryOverrides::default() };
        let policy = subscription.or(&plugin).resolve(&RetryPolicy::default());
        assert_eq!((policy.max_retries, policy.jitter, policy.backoff_factor), (1, 0.0, 2.0));
    }

    proptest! {
        #[test]
        fn a_delay_is_monotone_and_within_its_bound(
            initial in 0u64..100_000, extra in 0u64..100_000_000, factor in 1.0f64..1e6, retry in 1u32..1_000_000,
        ) {
            let policy = RetryPolicy {
                initial_delay: Duration::from_millis(initial),
                max_delay: Duration::from_millis(initial + extra),
                backoff_factor: factor,
                ..RetryPolicy::default()
            };
            let (this, next) = (policy.delay(retry), policy.delay(retry + 1));
            prop_assert!(this <= next && next <= policy.max_delay);
        }

        #[test]
        fn jitter_stays_within_its_share(roll in 0.0f64..1.0, jitter in 0.0f64..=1.0, retry in 1u32..1_000_000) {
            let policy = RetryPolicy { jitter, ..RetryPolicy::default() };
            let base = policy.delay(retry).as_secs_f64();
            let delay = policy.jittered(policy.delay(retry), roll).as_secs_f64();
            prop_assert!((delay - base).abs() <= base * jitter + 1e-6);
        }
    }
}
