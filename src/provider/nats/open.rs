//! Where the server is, who logs in, and the streams of a namespace.

use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::{ConnectOptions, ServerAddr};

use super::{Options, Storage};
use crate::error::{Error, Result, nearest};
use crate::provider::pause::pause;

/// The form of a URL.
const FORM: &str = "must be nats://[USER:PASSWORD@]HOST[:PORT][,HOST…][?namespace=NAME], or tls:// for TLS";

/// The server, and the part of it that is used.
pub(super) struct Place {
    pub(super) addresses: Vec<ServerAddr>,
    /// Whether nothing is said to a server in the clear.
    pub(super) is_encrypted: bool,
    login: Option<(String, String)>,
    /// For messages.
    pub(super) server: String,
    pub(super) namespace: String,
}

impl Place {
    /// Reads `nats://[user:password@]host[:port][,host…][?namespace=…]`.
    pub(super) fn read(options: &Options) -> Result<Self> {
        let (address, parameters) = options.url.split_once('?').unwrap_or((&options.url, ""));
        let (scheme, rest) = address.split_once("://").unwrap_or(("nats", ""));
        let (login, hosts) = rest.rsplit_once('@').map_or((None, rest), |(login, hosts)| (Some(login), hosts));
        let hosts = hosts.trim_end_matches('/');
        let server = format!("{scheme}://{hosts}");
        let refuse = |reason: String| Error::invalid("provider", &server, reason);
        if !matches!(scheme, "nats" | "tls") || hosts.is_empty() || hosts.contains('/') {
            return Err(refuse(FORM.to_owned()));
        }
        let login = login.map(|login| {
            let pair = login.split_once(':');
            let pair = pair.ok_or_else(|| refuse("a user needs a password; a token is set as nats.token".to_owned()));
            pair.map(|(user, password)| (decoded(user), decoded(password)))
        });
        let mut namespace = options.namespace.clone();
        for (name, value) in form_urlencoded::parse(parameters.as_bytes()) {
            if name != "namespace" {
                let hint = nearest(&name, ["namespace"]).map(|name| format!("; did you mean {name}?"));
                return Err(refuse(format!("{name} is no parameter{}", hint.unwrap_or_default())));
            }
            namespace = value.into_owned();
        }
        check_namespace(&namespace)?;
        for (name, bound) in [("connect", options.connect_timeout), ("response", options.response_timeout)] {
            if bound.is_zero() {
                return Err(Error::invalid(format!("nats.{name}_timeout"), "0s", "must be longer than nothing"));
            }
        }
        if !matches!(options.replicas, 1..=5) {
            return Err(Error::invalid("nats.replicas", options.replicas.to_string(), "must be 1 to 5"));
        }
        let addresses = hosts.split(',').map(|host| format!("{scheme}://{host}").parse::<ServerAddr>());
        let addresses = addresses.collect::<std::io::Result<_>>().map_err(|error| refuse(error.to_string()))?;
        Ok(Self { addresses, is_encrypted: scheme == "tls", login: login.transpose()?, server, namespace })
    }

    /// How to connect: who logs in, and how long anything may take.
    pub(super) async fn connecting(&self, options: &Options) -> Result<ConnectOptions> {
        let mut connecting = ConnectOptions::new()
            .name(format!("tidegate {}", self.namespace))
            .connection_timeout(options.connect_timeout)
            .request_timeout(Some(options.response_timeout))
            // Of the other servers of a cluster too, which it names without saying how they are reached.
            .require_tls(self.is_encrypted)
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| pause(u32::try_from(attempts).unwrap_or(u32::MAX)))
            // The messages of one subscription: what does not fit is lost, and read again.
            .subscription_capacity(1 << 19);
        let (user, password) = self.login.clone().unzip();
        let user = options.username.clone().or(user);
        if let Some(user) = user {
            let password = options.password.clone().or(password).unwrap_or_default();
            connecting = connecting.user_and_password(user, password);
        }
        if let Some(token) = &options.token {
            connecting = connecting.token(token.clone());
        }
        if let Some(path) = &options.credentials {
            let refuse = |error: std::io::Error| {
                Error::invalid("nats.credentials", path.display().to_string(), format!("cannot be used: {error}"))
            };
            connecting = connecting.credentials_file(path).await.map_err(refuse)?;
        }
        Ok(connecting)
    }
}

/// What percent-encoding stands for.
fn decoded(text: &str) -> String {
    let text = text.replace('+', "%2B").replace('&', "%26").replace('=', "%3D");
    form_urlencoded::parse(text.as_bytes()).next().map(|(text, _)| text.into_owned()).unwrap_or_default()
}

fn check_namespace(namespace: &str) -> Result<()> {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if namespace.is_empty() || namespace.len() > 100 || !namespace.bytes().all(is_legal) {
        return Err(Error::invalid("nats.namespace", namespace, "must be 1 to 100 of A-Z a-z 0-9 _ -"));
    }
    Ok(())
}

/// The streams of a namespace, and their subjects.
pub(super) struct Names {
    /// The stream with the log.
    pub(super) log: String,
    /// The stream with the snapshots.
    pub(super) snapshots: String,
    /// What all subjects of the log begin with.
    pub(super) prefix: String,
    /// What all subjects of the snapshots begin with.
    pub(super) snapshot_prefix: String,
}

impl Names {
    pub(super) fn of(namespace: &str) -> Self {
        Self {
            log: format!("tidegate-{namespace}"),
            snapshots: format!("tidegate-{namespace}-snapshots"),
            prefix: format!("tidegate.{namespace}."),
            snapshot_prefix: format!("tidegate-snapshots.{namespace}."),
        }
    }

    /// How the stream with the log is made. No limit removes anything: what does not fit is refused.
    pub(super) fn log_config(&self, options: &Options) -> Config {
        let max_bytes = options.max_bytes.map_or(-1, |bytes| i64::try_from(bytes.as_u64()).unwrap_or(-1));
        Config { max_bytes, ..self.config(&self.log, &self.prefix, options) }
    }

    /// How the stream with the snapshots is made.
    pub(super) fn snapshots_config(&self, options: &Options) -> Config {
        self.config(&self.snapshots, &self.snapshot_prefix, options)
    }

    fn config(&self, name: &str, prefix: &str, options: &Options) -> Config {
        Config {
            name: name.to_owned(),
            subjects: vec![format!("{prefix}>")],
            discard: DiscardPolicy::New,
            storage: match options.storage {
                Storage::File => StorageType::File,
                Storage::Memory => StorageType::Memory,
            },
            num_replicas: options.replicas,
            max_bytes: -1,
            max_messages: -1,
            max_messages_per_subject: -1,
            max_consumers: -1,
            max_message_size: -1,
            allow_direct: true,
            ..Config::default()
        }
    }
}
