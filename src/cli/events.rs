//! `tidegate events list|get`.

use anyhow::Result;

use super::client::{self, Client};
use super::exit::Exit;
use super::table::{Table, short};
use super::{print, print_line, view};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List events, newest first
    List(Box<List>),
    /// Show an event with its deliveries and attempts
    Get(Get),
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Only types that this pattern matches
    #[arg(long = "type", value_name = "PATTERN")]
    pattern: Option<String>,
    /// Only from this source
    #[arg(long)]
    source: Option<String>,
    /// Only in this status: pending, processing, completed or failed
    #[arg(long)]
    status: Option<String>,
    /// Only of this user
    #[arg(long, value_name = "ID")]
    user_id: Option<String>,
    /// Only with this schema
    #[arg(long)]
    schema: Option<String>,
    /// Only with this entity
    #[arg(long)]
    entity: Option<String>,
    /// Only with this operation
    #[arg(long)]
    operation: Option<String>,
    /// Only published by this instance
    #[arg(long, value_name = "ID")]
    instance_id: Option<String>,
    /// Only created at this instant or later, such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "INSTANT")]
    from: Option<String>,
    /// Only created at this instant or earlier
    #[arg(long, value_name = "INSTANT")]
    to: Option<String>,
    /// The most events, up to 1000 [default: 50]
    #[arg(long)]
    limit: Option<u16>,
    /// Go on where an earlier page ended
    #[arg(long)]
    cursor: Option<String>,
    /// Show each event's deliveries too
    #[arg(long)]
    deliveries: bool,
    #[command(flatten)]
    client: client::Args,
}

#[derive(Debug, clap::Args)]
pub(super) struct Get {
    /// The event's id
    id: String,
    #[command(flatten)]
    client: client::Args,
}

impl Command {
    pub(super) fn client(&self) -> &client::Args {
        match self {
            Self::List(args) => &args.client,
            Self::Get(args) => &args.client,
        }
    }
}

/// Lists or shows.
pub(super) async fn run(command: Command) -> Result<Exit> {
    match command {
        Command::List(args) => list(*args).await,
        Command::Get(args) => get(args).await,
    }
}

async fn list(args: List) -> Result<Exit> {
    let client = Client::new(&args.client)?;
    let query = [
        ("type", args.pattern),
        ("source", args.source),
        ("status", args.status),
        ("user_id", args.user_id),
        ("schema", args.schema),
        ("entity", args.entity),
        ("operation", args.operation),
        ("instance_id", args.instance_id),
        ("from", args.from),
        ("to", args.to),
        ("limit", args.limit.map(|limit| limit.to_string())),
        ("cursor", args.cursor),
    ];
    let answer = client.get(&["events"], &query).await?;
    if args.client.json && !args.deliveries {
        return print_line(answer);
    }
    let page: view::EventPage = serde_json::from_slice(&answer)?;
    if args.deliveries {
        let mut details = Vec::with_capacity(page.events.len());
        for event in &page.events {
            details.push(client.get(&["events", &event.id], &[]).await?);
        }
        if args.client.json {
            details.iter().try_for_each(|detail| print_line(detail).map(drop))?;
        } else {
            print(table_of_deliveries(&details)?)?;
        }
    } else {
        print(table(&page.events))?;
    }
    if let Some(cursor) = page.next_cursor {
        eprintln!("there are more: --cursor {cursor}");
    }
    Ok(Exit::Done)
}

fn table(events: &[view::Event]) -> String {
    let mut table = Table::new(&["SEQ", "TYPE", "STATUS", "RETRIES", "SOURCE", "CREATED", "ID"]);
    for event in events {
        table.row([
            event.seq(),
            event.r#type.clone(),
            event.status.clone(),
            event.retry_count.to_string(),
            event.source.clone(),
            event.created_at.clone(),
            short(&event.id, 40),
        ]);
    }
    table.render("no events")
}

/// One line per delivery, and one for an event that nothing matched.
fn table_of_deliveries<T: AsRef<[u8]>>(details: &[T]) -> Result<String> {
    let mut table = Table::new(&["SEQ", "TYPE", "STATUS", "HANDLER", "VERDICT", "ATTEMPTS", "REPLY OR ERROR"]);
    for detail in details {
        let event: view::Event = serde_json::from_slice(detail.as_ref())?;
        let head = [event.seq(), event.r#type.clone(), event.status.clone()];
        if event.deliveries.is_empty() {
            let [seq, r#type, status] = head.clone();
            table.row([seq, r#type, status, "-".into(), "-".into(), "0".into(), "no subscription matches".into()]);
        }
        for (n, delivery) in event.deliveries.iter().enumerate() {
            let [seq, r#type, status] = if n == 0 { head.clone() } else { Default::default() };
            let [handler, verdict, attempts, remark] = delivery.cells();
            table.row([seq, r#type, status, handler, verdict, attempts, remark]);
        }
    }
    Ok(table.render("no events"))
}

async fn get(args: Get) -> Result<Exit> {
    let answer = Client::new(&args.client)?.get(&["events", &args.id], &[]).await?;
    if args.client.json {
        return print_line(answer);
    }
    let event: view::Event = serde_json::from_slice(&answer)?;
    print(facts(&event))?;
    print(format!("\n{}", view::deliveries(&event.deliveries)))?;
    print(attempts(&event.deliveries))
}

fn facts(event: &view::Event) -> String {
    let payload = match (&event.payload, &event.payload_base64) {
        (Some(raw), _) => short(raw.get(), 2_000),
        (None, Some(encoded)) => format!("{} (base64) {}", event.content_type, short(encoded, 200)),
        (None, None) => String::new(),
    };
    let rows = [
        ("id", short(&event.id, 255)),
        ("seq", event.seq()),
        ("type", event.r#type.clone()),
        ("status", event.status.clone()),
        ("error", event.error.as_deref().map(|error| short(error, 500)).unwrap_or_default()),
        ("source", event.source.clone()),
        ("key", event.key.as_deref().map(|key| short(key, 255)).unwrap_or_default()),
        ("instance", short(&event.instance_id, 255)),
        ("created", event.created_at.clone()),
        ("completed", event.completed_at.clone().unwrap_or_default()),
        ("caused by", event.caused_by.as_deref().map(|id| short(id, 255)).unwrap_or_default()),
        ("metadata", short(event.metadata.get(), 2_000)),
        ("payload", payload),
    ];
    let shown = rows.iter().filter(|(_, value)| !value.is_empty());
    shown.map(|(name, value)| format!("{name:<10} {value}\n")).collect()
}

fn attempts(deliveries: &[view::Delivery]) -> String {
    let mut table = Table::new(&["SUBSCRIPTION", "ATTEMPT", "VERDICT", "TIME", "WORKER", "ERROR"]);
    for delivery in deliveries {
        for attempt in &delivery.attempts {
            let micros = std::time::Duration::from_micros(attempt.duration_us);
            table.row([
                delivery.subscription.clone(),
                attempt.number.to_string(),
                attempt.verdict.clone(),
                format!("{micros:?}"),
                short(&attempt.worker, 40),
                attempt.error.as_ref().map(|fault| short(&fault.to_string(), 120)).unwrap_or_default(),
            ]);
        }
    }
    format!("\n{}", table.render("no attempts"))
}
