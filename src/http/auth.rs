//! Who may call what: bearer tokens with scopes.
//!
//! Tokens are configured as SHA-256 digests, so that a configuration file gives none away. Tokens are long and random by
//! contract, which is why a plain digest is enough. There are no sessions, cookies or users here.

use std::net::{IpAddr, SocketAddr};

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::problem::Problem;
use crate::error::{Error, Result, quote};

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

/// Lets a request through, or says why not. Without tokens everybody on this machine may do everything, and nobody else.
///
/// # Errors
/// 401 without a known token, 403 when the token does not allow the call, or when there are none and the request is meant
/// for another host than this machine.
pub(super) fn check(tokens: &[Token], method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(scope) = needed(method, uri.path()) else { return Ok(()) };
    if tokens.is_empty() {
        return local_only(uri, headers);
    }
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

/// Refuses what was sent to another name than this machine's own. A page in a browser here may have had its own name lead to
/// this address (DNS rebinding), and sends that name; so does a proxy that passes on the host it was asked for.
fn local_only(uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
    let named = match (uri.authority(), headers.get(header::HOST)) {
        (Some(target), _) => target.as_str().as_bytes(),
        (None, Some(host)) => host.as_bytes(),
        (None, None) => return Ok(()),
    };
    let authority = Authority::try_from(named).ok();
    if authority.as_ref().is_some_and(|authority| is_this_machine(authority.host())) {
        return Ok(());
    }
    let named = quote(&String::from_utf8_lossy(named));
    let detail =
        format!("without tokens only requests to localhost are served, not those to {named}: add [[http.tokens]]");
    Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", detail))
}

fn is_this_machine(host: &str) -> bool {
    let name = host.to_ascii_lowercase();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.map_or(name == "localhost" || name.ends_with(".localhost"), |address| address.is_loopback())
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
        code(check(tokens, &method, &path.parse().unwrap(), &headers))
    }

    fn code(answer: Result<(), Problem>) -> u16 {
        answer.map_or_else(|problem| problem.into_response().status().as_u16(), |()| 200)
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
    fn without_tokens_only_this_machine_is_served() {
        let here =
            ["localhost", "LOCALHOST:7700", "app.localhost:80", "127.0.0.1:7700", "127.9.9.9", "[::1]:7700", "[::1]"];
        let elsewhere = [
            "evil.example",
            "evil.example:7700",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "notlocalhost",
            "192.0.2.7:7700",
            "0.0.0.0:7700",
            "[::]:7700",
            "localhost@evil.example",
            "a b",
            "",
        ];
        let all = [token("all", &[Scope::Admin])];
        for (hosts, expected) in [(&here[..], 200), (&elsewhere[..], 403)] {
            for host in hosts {
                let headers = HeaderMap::from_iter([
                    (header::HOST, host.parse().unwrap()),
                    (header::AUTHORIZATION, "Bearer all".parse().unwrap()),
                ]);
                let path: Uri = "/v1/events".parse().unwrap();
                assert_eq!(code(check(&[], &Method::GET, &path, &headers)), expected, "{host}");
                assert_eq!(code(check(&all, &Method::GET, &path, &headers)), 200, "{host}");
                assert_eq!(code(check(&[], &Method::GET, &"/healthz".parse().unwrap(), &headers)), 200, "{host}");
            }
        }
        // HTTP/2 has the name in the request's target.
        let target = |host| Uri::builder().scheme("http").authority(host).path_and_query("/v1/events").build().unwrap();
        assert_eq!(code(check(&[], &Method::GET, &target("localhost:7700"), &HeaderMap::new())), 200);
        assert_eq!(code(check(&[], &Method::GET, &target("evil.example"), &HeaderMap::new())), 403);
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
