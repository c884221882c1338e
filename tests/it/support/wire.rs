//! Requests as they are on the wire: any method, any header, any bytes.

use reqwest::Method;
use serde_json::Value;

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) text: String,
}

impl Reply {
    /// The body as JSON; null where it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }
}

/// A client. The process speaks TLS by whatever provider was chosen first.
pub(crate) fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(std::time::Duration::from_secs(30)).build().unwrap()
}

/// Sends one request.
pub(crate) async fn send(
    url: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<reqwest::Body>,
) -> Reply {
    let mut request =
        client().request(Method::from_bytes(method.as_bytes()).unwrap(), format!("{url}{path}")).body(body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let answer = request.send().await.unwrap();
    let content_type = answer.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
    Reply {
        status: answer.status().as_u16(),
        content_type: content_type.unwrap_or_default(),
        text: answer.text().await.unwrap(),
    }
}

/// POSTs JSON text as it stands.
pub(crate) async fn post(url: &str, path: &str, text: impl Into<String>) -> Reply {
    send(url, "POST", path, &[("content-type", "application/json")], text.into()).await
}

/// GETs a path.
pub(crate) async fn get(url: &str, path: &str) -> Reply {
    send(url, "GET", path, &[], "").await
}
