# One command per thing that developers and CI do. `make` alone lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart test check bench plugins plugins-js plugins-test setup setup-plugins setup-stores

help: ## List these commands
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

quickstart: plugins ## Build host and samples, publish a stream of shop events, and stay up (QUICKSTART_EXIT=1 ends it)
	@scripts/quickstart.sh

test: setup plugins ## Run every test
	cargo test --features conformance
	$(MAKE) plugins-test

check: ## Formatting, lints over every feature set, rustdoc, and the import table
	cargo fmt --all --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features
	cargo test --features conformance --test it house::
	cargo fmt --all --check --manifest-path plugins/Cargo.toml

bench: setup plugins ## Run the benchmarks that performance claims rest on
	cargo bench

plugins: setup-plugins ## Build every sample plugin and the one that misbehaves into target/plugins
	cargo run --quiet -- plugin build plugins --all --output target/plugins

plugins-js: ## Build the sample in JavaScript (needs Node.js with npm), serve it and check its answers
	cd plugins/invoice-lines-js && npm install --no-save && npm run build
	cargo run --quiet -- plugin embed plugins/invoice-lines-js/target/invoice-lines.wasm \
		--manifest plugins/invoice-lines-js/plugin.toml --output target/plugins/
	@scripts/try-js.sh

plugins-test: ## Test the plugin SDK and the samples, natively
	cargo test --quiet --manifest-path plugins/Cargo.toml

setup: setup-plugins setup-stores ## Install what building plugins and testing need and cargo does not bring

setup-plugins:
	@scripts/setup-wasm.sh

setup-stores:
	@scripts/setup-stores.sh
	@scripts/setup-redis.sh
	@scripts/setup-nats.sh
