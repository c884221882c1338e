//! Who may call what: bearer tokens with scopes.
//!
//! Tokens are configured as SHA-256 digests, so that a configuration file gives none away. Tokens are long and random by
//! contract, which is why a plain digest is enough. There are no sessions, cookies or users here.

use std::net::SocketAddr;

use axum::http::{HeaderMap, Method, StatusCode, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::problem::Problem;
use crate::error::{Error, Result};

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// To publish events.
    Publish,
    /// To read everything.
    Read,
    /// Everything.
    Admin,
}

/// A token, by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Whose it is; for the log.
    pub name: String,
    /// SHA-256 of the token, as 64 hex digits.
    pub sha256: String,
    /// What it allows.
    pub scopes: Vec<Scope>,
}

impl Token {
    fn validate(&self) -> Result<()> {
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let reason = "must be the SHA-256 of the token as 64 hex digits";
            return Err(Error::invalid(format!("http.tokens.{}.sha256", self.name), "***", reason));
        }
        if self.scopes.is_empty() {
            let reason = "must hold at least one of publish, read, admin";
            return Err(Error::invalid(format!("http.tokens.{}.scopes", self.name), "[]", reason));
        }
        Ok(())
    }

    fn allows(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin)
    }
}

/// Checks the tokens themselves, and that whoever is not on this machine needs one.
///
/// # Errors
/// [`Error::Invalid`] naming the token, or `listen`.
pub(super) fn validate(listen: SocketAddr, tokens: &[Token]) -> Result<()> {
    tokens.iter().try_for_each(Token::validate)?;
    if tokens.is_empty() && !listen.ip().is_loopback() {
        let reason = "is open to other machines and needs tokens: add [[http.tokens]], or listen on 127.0.0.1";
        return Err(Error::invalid("listen", listen.to_string(), reason));
    }
    Ok(())
}

/// What a call needs; `None` for what anybody may ask.
fn needed(method: &Method, path: &str) -> Option<Scope> {
    match (method, path) {
        (_, "/healthz" | "/readyz") => None,
        (&Method::GET | &Method::HEAD, _) => Some(Scope::Read),
        (&Method::POST, "/v1/events") => Some(Scope::Publish),
        // Where a reader is, is the reader's own.
        (&Method::POST, path) if path.starts_with("/v1/consumers/") => Some(Scope::Read),
        _ => Some(Scope::Admin),
    }
}

/// Lets a request through, or says why not. Without tokens everybody on this machine may do everything.
///
/// # Errors
/// 401 without a known token, 403 when the token does not allow the call.
pub(super) fn check(tokens: &[Token], method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(scope) = needed(method, path).filter(|_| !tokens.is_empty()) else { return Ok(()) };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(bearer);
    let refuse = |detail: &str| Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail);
    let Some(given) = given else { return Err(refuse("send a token as authorization: Bearer <token>")) };
    let digest = hex(&Sha256::digest(given));
    let token = tokens.iter().find(|token| token.sha256.eq_ignore_ascii_case(&digest));
    match token {
        None => Err(refuse("the token is not known")),
        Some(token) if token.allows(scope) => Ok(()),
        Some(token) => {
            let scope = format!("{scope:?}").to_lowercase();
            let detail = format!("token {} lacks the scope {scope}", token.name);
            Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail))
        }
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse as _;

    fn token(name: &str, scopes: &[Scope]) -> Token {
        Token { name: name.into(), sha256: hex(&Sha256::digest(name)), scopes: scopes.to_vec() }
    }

    fn status(tokens: &[Token], given: Option<&str>, method: Method, path: &str) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some(given) = given {
            headers.insert(header::AUTHORIZATION, format!("bearer {given}").parse().unwrap());
        }
        check(tokens, &method, path, &headers)
            .map_or_else(|problem| problem.into_response().status().as_u16(), |()| 200)
    }

    #[test]
    fn a_token_allows_what_its_scopes_say() {
        let tokens = [token("pub", &[Scope::Publish]), token("see", &[Scope::Read]), token("all", &[Scope::Admin])];
        let rows = [
            (None, Method::GET, "/healthz", 200),
            (None, Method::GET, "/v1/events", 401),
            (Some("guess"), Method::GET, "/v1/events", 401),
            (Some("pub"), Method::POST, "/v1/events", 200),
            (Some("pub"), Method::GET, "/v1/events", 403),
            (Some("see"), Method::GET, "/metrics", 200),
            (Some("see"), Method::POST, "/v1/events", 403),
            (Some("see"), Method::DELETE, "/v1/events/1", 403),
            (Some("see"), Method::POST, "/v1/plugins/a/reload", 403),
            (Some("pub"), Method::POST, "/v1/plugins/a/reload", 403),
            (Some("all"), Method::DELETE, "/v1/events/1", 200),
            (Some("all"), Method::POST, "/v1/events", 200),
        ];
        for (given, method, path, expected) in rows {
            assert_eq!(status(&tokens, given, method.clone(), path), expected, "{given:?} {method} {path}");
        }
        assert_eq!(status(&[], None, Method::DELETE, "/v1/events/1"), 200);
    }

    #[test]
    fn an_address_that_others_reach_needs_tokens() {
        let tokens = [token("ci", &[Scope::Admin])];
        assert!(validate("127.0.0.1:7700".parse().unwrap(), &[]).is_ok());
        assert!(validate("[::1]:7700".parse().unwrap(), &[]).is_ok());
        assert!(validate("0.0.0.0:7700".parse().unwrap(), &tokens).is_ok());
        for open in ["0.0.0.0:7700", "192.0.2.7:7700", "[::]:7700"] {
            let error = validate(open.parse().unwrap(), &[]).unwrap_err().to_string();
            assert!(error.contains("needs tokens") && error.contains(open), "{error}");
        }
    }

    #[test]
    fn a_token_in_clear_is_refused_without_being_shown() {
        let clear = Token { name: "ci".into(), sha256: "hunter2".into(), scopes: vec![Scope::Read] };
        let error = validate("127.0.0.1:1".parse().unwrap(), &[clear]).unwrap_err().to_string();
        assert!(error.contains("http.tokens.ci.sha256") && !error.contains("hunter2"), "{error}");
    }
}
