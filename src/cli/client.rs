//! Asking a server over HTTP.
//!
//! Bodies stay bytes: what is not looked at is handed on as the server sent it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use reqwest::{Method, RequestBuilder, Response, Url};
use serde::{Deserialize, Serialize};

use super::exit::Usage;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// How long an answer may take, beyond what the server was asked to wait.
const ANSWER: Duration = Duration::from_secs(60);

/// Which server is asked, and how its answers are shown.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// The server
    #[arg(long, env = "TIDEGATE_URL", default_value = "http://127.0.0.1:7700", value_name = "URL")]
    pub(super) url: String,
    /// The token, where the server asks for one
    #[arg(long, env = "TIDEGATE_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(super) token: Option<String>,
    /// Print the server's JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Why there is no answer to show.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("no tidegate answers at {url} (is `tidegate serve` running?)")]
    Unreachable {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{detail}")]
    Refused { status: u16, detail: String, problem: String },
}

/// The part of a problem that is shown to people.
#[derive(Deserialize)]
struct Problem {
    detail: String,
}

/// A server to ask.
pub(super) struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<String>,
}

impl Client {
    /// A client for the server that `args` name. Nothing is sent yet.
    pub(super) fn new(args: &Args) -> Result<Self> {
        let base = Url::parse(&args.url).map_err(|error| Usage(format!("--url {}: {error}", args.url)))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(Usage(format!("--url {}: must begin with http:// or https://", args.url)).into());
        }
        // Somebody else in this process may have chosen already; either choice will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder =
            reqwest::Client::builder().connect_timeout(CONNECT).redirect(reqwest::redirect::Policy::none());
        if base.scheme() == "http" {
            // Without certificates to load, a machine that has none can still ask over plain HTTP.
            builder = builder.tls_certs_only([]);
        }
        if is_loopback(&base) {
            builder = builder.no_proxy();
        }
        let http = builder.build().context("cannot set up HTTP")?;
        Ok(Self { http, base, token: args.token.clone() })
    }

    /// GETs what is at the path of these segments.
    pub(super) async fn get(&self, path: &[&str], query: &[(&str, Option<String>)]) -> Result<Bytes> {
        self.send(Method::GET, path, query, None, Duration::ZERO).await
    }

    /// Sends `body` as JSON. `patience` is what the server was asked to wait.
    pub(super) async fn send_json<T: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, Option<String>)],
        body: &T,
        patience: Duration,
    ) -> Result<Bytes> {
        self.send(method, path, query, Some(serde_json::to_vec(body)?), patience).await
    }

    async fn send(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, Option<String>)],
        body: Option<Vec<u8>>,
        patience: Duration,
    ) -> Result<Bytes> {
        let mut request = self.request(method, path, query).timeout(ANSWER + patience);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let answer = self.answer(request).await?;
        Ok(answer.bytes().await.map_err(|source| self.unreachable(source))?)
    }

    /// GETs what has no end, from the place that an earlier stream of it got to. The server answers in time or not at
    /// all; how long it may be silent afterwards is the reader's matter.
    pub(super) async fn stream(
        &self,
        path: &[&str],
        query: &[(&str, Option<String>)],
        place: Option<&str>,
    ) -> Result<Response> {
        let mut request = self.request(Method::GET, path, query).header("accept", "text/event-stream");
        if let Some(place) = place {
            request = request.header("last-event-id", place);
        }
        match tokio::time::timeout(ANSWER, self.answer(request)).await {
            Ok(answer) => answer,
            Err(_) => anyhow::bail!("{} did not answer within {ANSWER:?}", self.base),
        }
    }

    fn request(&self, method: Method, path: &[&str], query: &[(&str, Option<String>)]) -> RequestBuilder {
        let request = self.http.request(method, self.address(path, query));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    fn unreachable(&self, source: reqwest::Error) -> ClientError {
        ClientError::Unreachable { url: self.base.to_string(), source }
    }

    /// The head of an answer that is a success.
    async fn answer(&self, request: RequestBuilder) -> Result<Response> {
        let answer = request.send().await.map_err(|source| self.unreachable(source))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let bytes = answer.bytes().await.map_err(|source| self.unreachable(source))?;
        let problem = String::from_utf8_lossy(&bytes).into_owned();
        let detail = serde_json::from_slice::<Problem>(&bytes).map(|problem| problem.detail);
        let detail = detail.unwrap_or_else(|_| format!("{} answered {status}", self.base));
        Err(ClientError::Refused { status: status.as_u16(), detail, problem }.into())
    }

    fn address(&self, path: &[&str], query: &[(&str, Option<String>)]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(path);
        }
        let given = query.iter().filter_map(|(name, value)| Some((*name, value.as_deref()?)));
        let given: Vec<(&str, &str)> = given.collect();
        if !given.is_empty() {
            url.query_pairs_mut().extend_pairs(given);
        }
        url
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    host == "localhost" || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Result<Client> {
        Client::new(&Args { url: url.to_owned(), token: None, json: false })
    }

    #[test]
    fn an_id_travels_as_one_segment() {
        let client = client("http://127.0.0.1:1/prefix/").unwrap();
        let url = client.address(&["events", "a/b ?"], &[("type", Some("a.*".to_owned())), ("limit", None)]);
        assert_eq!(url.as_str(), "http://127.0.0.1:1/prefix/v1/events/a%2Fb%20%3F?type=a.*");
    }

    #[test]
    fn only_http_is_spoken() {
        assert!(client("127.0.0.1:7700").is_err());
        assert!(client("ftp://x").is_err());
    }
}
