//! Keeps what every customer has spent and how often, and publishes the new total after each order.
//!
//! It does not remember which orders it has seen: the host writes and publishes together with the attempt's success, so
//! that an order that is delivered twice after a crash is still counted once. It does not convert currencies.

use serde::{Deserialize, Serialize};
use tidegate_plugin::prelude::*;

tidegate_plugin::plugin!(count);

/// What `shop.orders.create` carries. More fields are fine.
#[derive(Deserialize)]
struct Order {
    order_id: String,
    customer: String,
    total_cents: u32,
    currency: String,
}

/// What `shop.totals.update` carries.
#[derive(Serialize)]
struct Total<'a> {
    customer: &'a str,
    total_cents: i64,
    orders: i64,
}

fn count(Json(order): Json<Order>) -> Result<(), Failure> {
    let currency = config::get("currency").unwrap_or_else(|| "EUR".to_owned());
    if order.currency != currency {
        let message = format!("order {} is in {}, and totals are kept in {currency}", order.order_id, order.currency);
        return Err(Failure::reject("unsupported-currency", message).detail("order_id", &order.order_id));
    }
    let totals = kv::bucket("totals");
    let total = Total {
        customer: &order.customer,
        total_cents: totals.increment(&format!("{}.cents", order.customer), i64::from(order.total_cents))?,
        orders: totals.increment(&format!("{}.orders", order.customer), 1)?,
    };
    events::publish_with("shop.totals.update", &total, &[("key", &order.customer)])?;
    info!("order counted", order_id = order.order_id, customer = order.customer, total_cents = total.total_cents);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tidegate_plugin::{
        Failure,
        testing::{self, Host},
    };

    use super::count;

    fn host() -> Host {
        Host::for_manifest(include_str!("../plugin.toml")).unwrap()
    }

    fn deliver(host: &Host, payload: Value) -> Result<(), Failure> {
        host.deliver(count, testing::event("shop.orders.create", &payload)).map(|reply| assert_eq!(reply, None))
    }

    fn order(customer: &str, total_cents: u32) -> Value {
        json!({
            "order_id": "o-20260117-0001", "customer": customer, "total_cents": total_cents, "currency": "EUR",
            "lines": [{"sku": "mug-blue", "quantity": 2, "price_cents": 1299}],
        })
    }

    #[test]
    fn totals_are_kept_per_customer_and_published() {
        let host = host();
        for (customer, cents) in [("c-1017", 4599), ("c-2040", 1200), ("c-1017", 401)] {
            deliver(&host, order(customer, cents)).unwrap();
        }
        assert_eq!(host.kv_number("totals", "c-1017.cents"), Some(5000));
        assert_eq!(host.kv_number("totals", "c-1017.orders"), Some(2));
        assert_eq!(host.kv_number("totals", "c-2040.cents"), Some(1200));

        let published = host.published();
        assert_eq!(published.len(), 3);
        assert_eq!(published[2].event_type, "shop.totals.update");
        assert_eq!(
            published[2].json::<Value>().unwrap(),
            json!({"customer": "c-1017", "total_cents": 5000, "orders": 2})
        );
        assert_eq!(published[2].attributes, [("key".to_owned(), "c-1017".to_owned())]);
    }

    #[test]
    fn an_order_in_another_currency_is_rejected_and_not_counted() {
        let host = host().config("currency", "SEK");
        let failure = deliver(&host, order("c-1017", 4599)).unwrap_err();
        assert_eq!(failure.code(), "unsupported-currency");
        assert!(!failure.is_retry());
        assert_eq!(host.kv_number("totals", "c-1017.cents"), None);
    }

    #[test]
    fn an_order_without_a_customer_is_rejected() {
        let failure = deliver(&host(), json!({"order_id": "o-1", "total_cents": 1, "currency": "EUR"})).unwrap_err();
        assert_eq!(failure.code(), "invalid-payload");
        assert!(failure.message().contains("customer"), "{failure}");
    }

    #[test]
    fn a_negative_total_is_rejected() {
        let mut order = order("c-1017", 1);
        order["total_cents"] = json!(-1);
        assert_eq!(deliver(&host(), order).unwrap_err().code(), "invalid-payload");
    }
}
