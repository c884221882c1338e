//! Tells a publisher who waits whether a signup is acceptable, and if not, why.
//!
//! A signup that is turned down is handled successfully: the answer is the reply, and trying again would not change it.
//! Only a payload that is no signup at all is rejected. It looks at the form of an address, not whether it exists, and
//! keeps nothing.

use serde::{Deserialize, Serialize};
use tidegate_plugin::prelude::*;

tidegate_plugin::plugin!(judge);

/// Addresses that are thrown away after one mail. The operator adds more by the setting `blocked-domains`.
const DISPOSABLE: [&str; 6] =
    ["10minutemail.com", "discard.email", "guerrillamail.com", "mailinator.com", "sharklasers.com", "yopmail.com"];

/// What `shop.users.create` carries. More fields are fine.
#[derive(Deserialize)]
struct Signup {
    email: String,
    #[serde(default)]
    name: String,
}

#[derive(Serialize)]
struct Answer {
    accepted: bool,
    reasons: Vec<Reason>,
}

/// Why a signup is turned down. The words on the wire are stable.
#[derive(Serialize, Debug, Clone, Copy)]
#[serde(rename_all = "kebab-case")]
enum Reason {
    NameMissing,
    EmailMalformed,
    EmailDisposable,
}

fn judge(Json(signup): Json<Signup>) -> Result<Reply, Failure> {
    let mut reasons = Vec::new();
    if signup.name.trim().is_empty() {
        reasons.push(Reason::NameMissing);
    }
    match domain(&signup.email) {
        None => reasons.push(Reason::EmailMalformed),
        Some(domain) if is_disposable(&domain) => reasons.push(Reason::EmailDisposable),
        Some(_) => {}
    }
    let accepted = reasons.is_empty();
    info!("signup judged", accepted = accepted, reasons = reasons.len());
    Reply::json(&Answer { accepted, reasons })
}

/// The domain of an address in lower case, when the address has the form of one.
fn domain(email: &str) -> Option<String> {
    let (local, domain) = email.trim().rsplit_once('@')?;
    let is_local = !local.is_empty() && local.len() <= 64 && !local.contains(['@', ' ', '"', ',']);
    let is_domain = domain.len() <= 253 && domain.contains('.') && domain.split('.').all(is_label);
    (is_local && is_domain).then(|| domain.to_ascii_lowercase())
}

fn is_label(label: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || c == '-';
    !label.is_empty()
        && label.len() <= 63
        && label.chars().all(inside)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// A domain is blocked together with everything below it.
fn is_disposable(domain: &str) -> bool {
    let below =
        |blocked: &str| domain == blocked || domain.strip_suffix(blocked).is_some_and(|rest| rest.ends_with('.'));
    let more = config::get("blocked-domains").unwrap_or_default().to_ascii_lowercase();
    DISPOSABLE.into_iter().any(below) || more.split(',').map(str::trim).filter(|name| !name.is_empty()).any(below)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tidegate_plugin::testing::{self, Host};

    use super::{domain, judge};

    fn answer(host: &Host, signup: Value) -> Value {
        let reply = host.deliver(judge, testing::event("shop.users.create", &signup)).unwrap().unwrap();
        assert_eq!(reply.content_type, "application/json");
        reply.read().unwrap()
    }

    fn host() -> Host {
        Host::for_manifest(include_str!("../plugin.toml")).unwrap()
    }

    #[test]
    fn a_good_signup_is_accepted() {
        let signup = json!({"email": "Ada.Lovelace@example.org", "name": "Ada Lovelace", "newsletter": true});
        assert_eq!(answer(&host(), signup), json!({"accepted": true, "reasons": []}));
    }

    #[test]
    fn every_reason_is_given_at_once() {
        let signup = json!({"email": "bob@mail.mailinator.com", "name": "  "});
        assert_eq!(
            answer(&host(), signup),
            json!({"accepted": false, "reasons": ["name-missing", "email-disposable"]})
        );
        assert_eq!(
            answer(&host(), json!({"email": "bob"})),
            json!({"accepted": false, "reasons": ["name-missing", "email-malformed"]})
        );
    }

    #[test]
    fn the_operator_blocks_more_domains() {
        let signup = || json!({"email": "eve@Spam.test", "name": "Eve"});
        assert_eq!(answer(&host(), signup())["accepted"], true);
        let host = host().config("blocked-domains", "other.test, spam.test");
        assert_eq!(answer(&host, signup()), json!({"accepted": false, "reasons": ["email-disposable"]}));
    }

    #[test]
    fn a_payload_that_is_no_signup_is_rejected() {
        let failure = host().deliver(judge, testing::event("shop.users.create", &json!({"name": "Ada"}))).unwrap_err();
        assert!(!failure.is_retry());
        assert_eq!(failure.code(), "invalid-payload");
        assert!(failure.message().contains("email"), "{failure}");
    }

    #[test]
    fn addresses_are_told_from_other_text() {
        for good in ["a@b.co", "first.last+tag@sub.example.com", "user@münchen.example"] {
            assert!(domain(good).is_some(), "{good}");
        }
        for bad in ["", "a", "@b.co", "a@", "a@b", "a@b..co", "a@-b.co", "a b@c.de", "a@b@c.de", "a@b.c d"] {
            assert_eq!(domain(bad), None, "{bad}");
        }
    }
}
