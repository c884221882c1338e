// Adds up the lines of an invoice for a publisher who waits. What is no invoice is rejected, with the reason.
import { attempt } from "tidegate:plugin/delivery@1.0.0";
import { emit } from "tidegate:plugin/log@1.0.0";

const INFO = 2;
const WARN = 3;

export const handler = {
  handle(event) {
    const invoice = parsed(event.payload);
    const total_cents = total(invoice);
    emit(INFO, "invoice added up", [["invoice", invoice.invoice_id], ["attempt", String(attempt())]]);
    const reply = { invoice_id: invoice.invoice_id, lines: invoice.lines.length, total_cents };
    return { contentType: "application/json", body: encoded(JSON.stringify(reply)) };
  },
};

// What is thrown in the form of `failure` in plugin.wit is the handler's verdict. Any other exception is a trap.
function rejected(code, message, details = []) {
  emit(WARN, "invoice rejected", [["reason", message]]);
  return { tag: "reject", val: { code, message, details } };
}

function parsed(payload) {
  try {
    return JSON.parse(decoded(payload));
  } catch (error) {
    throw rejected("invalid-payload", `the payload is no JSON: ${error.message}`);
  }
}

function total(invoice) {
  const { invoice_id, lines } = invoice ?? {};
  if (typeof invoice_id !== "string" || invoice_id === "") {
    throw rejected("invalid-payload", "invoice_id must be a text that is not empty");
  }
  if (!Array.isArray(lines) || lines.length === 0) {
    throw rejected("invalid-lines", `invoice ${invoice_id} has no lines`);
  }
  const sum = lines.reduce((sum, line, index) => sum + lineTotal(line, index + 1), 0);
  if (!Number.isSafeInteger(sum)) {
    throw rejected("invalid-lines", "the lines come to more than can be counted exactly");
  }
  return sum;
}

function lineTotal(line, number) {
  for (const [field, least] of [["quantity", 1], ["unit_cents", 0]]) {
    const value = line?.[field];
    if (!Number.isSafeInteger(value) || value < least) {
      const shown = JSON.stringify(value)?.slice(0, 100) ?? "missing";
      const message = `line ${number}: ${field} must be a whole number from ${least}, and is ${shown}`;
      throw rejected("invalid-lines", message, [["line", String(number)], ["field", field]]);
    }
  }
  return line.quantity * line.unit_cents;
}

// UTF-8 by hand: this engine has neither TextDecoder nor TextEncoder.
function decoded(bytes) {
  let latin = "";
  for (let at = 0; at < bytes.length; at += 4096) {
    latin += String.fromCharCode(...bytes.subarray(at, at + 4096));
  }
  return decodeURIComponent(escape(latin));
}

function encoded(text) {
  return Uint8Array.from(unescape(encodeURIComponent(text)), (char) => char.charCodeAt(0));
}
