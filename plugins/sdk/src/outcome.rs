//! What an attempt ends with: a reply, or a failure that says whether another attempt makes sense.
//!
//! Delays and attempt counts are the host's: a handler only says "again" or "never".

use core::{fmt, time::Duration};

use serde::Serialize;

/// What a publisher who waits gets back; it is also kept with the attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What the body is.
    pub content_type: String,
    /// The body. The host's limit is 64 KiB unless it was configured otherwise.
    pub body: Vec<u8>,
}

impl Reply {
    /// A reply with a content type of its own.
    pub fn new(content_type: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self { content_type: content_type.into(), body: body.into() }
    }

    /// `value` as JSON. Rejected with the code `invalid-reply` when it has no JSON form (a map with keys that are not
    /// strings, for example).
    pub fn json(value: &impl Serialize) -> Result<Self, Failure> {
        match serde_json::to_vec(value) {
            Ok(body) => Ok(Self::new("application/json", body)),
            Err(why) => Err(Failure::reject("invalid-reply", format!("reply cannot be written as JSON: {why}"))),
        }
    }

    /// Plain text.
    pub fn text(body: impl Into<String>) -> Self {
        Self::new("text/plain; charset=utf-8", body.into())
    }
}

/// Why an attempt failed, and whether to try again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    fault: Fault,
    again: Again,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    Never,
    ByPolicy,
    After(Duration),
}

impl Failure {
    /// Transient: try again, as the subscription's retry policy says.
    ///
    /// `code` is a short stable word such as `upstream-timeout`: operators filter dead letters by it.
    pub fn retry(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { fault: Fault::new(code, message), again: Again::ByPolicy }
    }

    /// Permanent: no further attempt, straight to the dead letters.
    pub fn reject(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { fault: Fault::new(code, message), again: Again::Never }
    }

    /// Try again after this long instead of the policy's delay. Means nothing on a rejection.
    pub fn after(mut self, delay: Duration) -> Self {
        if self.is_retry() {
            self.again = Again::After(delay);
        }
        self
    }

    /// Adds a fact for whoever looks at the failed delivery.
    pub fn detail(mut self, name: impl Into<String>, value: impl fmt::Display) -> Self {
        self.fault.details.push((name.into(), value.to_string()));
        self
    }

    /// The short stable word.
    pub fn code(&self) -> &str {
        &self.fault.code
    }

    /// The sentence for people.
    pub fn message(&self) -> &str {
        &self.fault.message
    }

    /// The facts that were added.
    pub fn details(&self) -> &[(String, String)] {
        &self.fault.details
    }

    /// Whether another attempt is asked for.
    pub fn is_retry(&self) -> bool {
        self.again != Again::Never
    }

    /// The delay that was asked for instead of the policy's.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.again {
            Again::After(delay) => Some(delay),
            Again::Never | Again::ByPolicy => None,
        }
    }

    #[cfg(target_family = "wasm")]
    pub(crate) fn into_fault(self) -> Fault {
        self.fault
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_retry() { "retry" } else { "reject" };
        write!(f, "{verdict} ({}): {}", self.fault.code, self.fault.message)
    }
}

impl core::error::Error for Failure {}

/// What the host answers when it does not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A short stable word, such as `denied`.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// Facts about the fault.
    pub details: Vec<(String, String)>,
}

impl Fault {
    /// A fault without details.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), details: Vec::new() }
    }

    /// Whether the same call can only fail again: it was refused (`denied`), was wrong (`invalid`, `invalid-…`) or too
    /// much (`too-large`, `too-many`).
    pub fn is_permanent(&self) -> bool {
        matches!(self.code.as_str(), "denied" | "invalid" | "too-large" | "too-many")
            || self.code.starts_with("invalid-")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

impl core::error::Error for Fault {}

/// So that `?` works on every call to the host: a permanent fault rejects the delivery, any other asks for a retry.
impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        let again = if fault.is_permanent() { Again::Never } else { Again::ByPolicy };
        Self { fault, again }
    }
}

/// Turns any error, or an absent value, into a [`Failure`] where it happens.
pub trait OrFail<T> {
    /// Ask for another attempt, with this code.
    fn or_retry(self, code: &str) -> Result<T, Failure>;
    /// Give the delivery up, with this code.
    fn or_reject(self, code: &str) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> OrFail<T> for Result<T, E> {
    fn or_retry(self, code: &str) -> Result<T, Failure> {
        self.map_err(|why| Failure::retry(code, why.to_string()))
    }

    fn or_reject(self, code: &str) -> Result<T, Failure> {
        self.map_err(|why| Failure::reject(code, why.to_string()))
    }
}

impl<T> OrFail<T> for Option<T> {
    fn or_retry(self, code: &str) -> Result<T, Failure> {
        self.ok_or_else(|| Failure::retry(code, "a value that this handler needs is absent"))
    }

    fn or_reject(self, code: &str) -> Result<T, Failure> {
        self.ok_or_else(|| Failure::reject(code, "a value that this handler needs is absent"))
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use super::{Failure, Fault, OrFail};

    #[test]
    fn a_delay_belongs_to_a_retry_only() {
        let second = Duration::from_secs(1);
        assert_eq!(Failure::retry("busy", "busy").after(second).retry_after(), Some(second));
        assert_eq!(Failure::reject("bad", "bad").after(second).retry_after(), None);
    }

    #[test]
    fn a_refused_call_rejects_and_a_store_that_is_away_retries() {
        assert!(!Failure::from(Fault::new("denied", "bucket totals is not granted")).is_retry());
        assert!(!Failure::from(Fault::new("invalid-type", "a..b")).is_retry());
        assert!(Failure::from(Fault::new("unavailable", "store is away")).is_retry());
    }

    #[test]
    fn any_error_becomes_a_failure_with_a_code() {
        let failure = "seven".parse::<u8>().or_retry("not-yet").unwrap_err();
        assert_eq!(failure.to_string(), "retry (not-yet): invalid digit found in string");
        let failure = None::<u8>.or_reject("no-owner").unwrap_err().detail("order", 7);
        assert_eq!(failure.details(), [("order".to_owned(), "7".to_owned())]);
        assert!(!failure.is_retry());
    }
}
