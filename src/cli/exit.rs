//! How a command ends: its exit code, and what is said about trouble.

use std::process::ExitCode;

use serde_json::json;

use super::client::ClientError;
use crate::error::Error;

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// 0
    Done,
    /// 1
    Failed,
    /// 2
    Usage,
    /// 3
    NotFound,
    /// 4
    Unreachable,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NotFound => 3,
            Exit::Unreachable => 4,
        })
    }
}

/// Trouble with what was typed, found before anybody was asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub(super) String);

/// Says what went wrong, in words or as one JSON object, and gives the exit code for it.
pub(super) fn report(error: &anyhow::Error, json: bool) -> Exit {
    match (json, error.downcast_ref::<ClientError>()) {
        (true, Some(ClientError::Refused { problem, .. })) => eprintln!("{problem}"),
        (true, _) => eprintln!("{}", json!({"code": code(error), "detail": format!("{error:#}")})),
        (false, _) => eprintln!("error: {error:#}"),
    }
    exit_of(error)
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return match error {
            ClientError::Unreachable { .. } => Exit::Unreachable,
            ClientError::Refused { status: 404, .. } => Exit::NotFound,
            ClientError::Refused { status: 400 | 422, .. } => Exit::Usage,
            ClientError::Refused { .. } => Exit::Failed,
        };
    }
    match error.downcast_ref::<Error>() {
        Some(Error::Invalid { .. }) => Exit::Usage,
        Some(Error::NotFound { .. }) => Exit::NotFound,
        None if error.is::<Usage>() => Exit::Usage,
        _ => Exit::Failed,
    }
}

fn code(error: &anyhow::Error) -> &'static str {
    match (error.downcast_ref::<Error>(), exit_of(error)) {
        (Some(error), _) => error.code(),
        (None, Exit::Unreachable) => "unreachable",
        (None, Exit::Usage) => "usage",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_trouble_has_its_exit_code() {
        let refused = |status| ClientError::Refused { status, detail: String::new(), problem: String::new() };
        let rows: [(anyhow::Error, Exit); 8] = [
            (refused(404).into(), Exit::NotFound),
            (refused(422).into(), Exit::Usage),
            (refused(409).into(), Exit::Failed),
            (refused(503).into(), Exit::Failed),
            (Error::invalid("provider", "x", "unknown provider: x").into(), Exit::Usage),
            (Error::not_found("event", "x").into(), Exit::NotFound),
            (Usage("no".into()).into(), Exit::Usage),
            (anyhow::anyhow!("disk full"), Exit::Failed),
        ];
        for (error, exit) in rows {
            assert_eq!(exit_of(&error), exit, "{error:?}");
        }
    }
}
