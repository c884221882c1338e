# One command per thing that developers and CI do. `make` alone lists them.

.PHONY: help setup plugins plugins-test

help: ## List these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

setup: ## Install what building needs and cargo does not bring
	@scripts/setup-wasm.sh

plugins: ## Build every sample plugin and the one that misbehaves into target/plugins
	cargo run --quiet -- plugin build plugins --all --output target/plugins

plugins-test: ## Test the plugin SDK and the samples, natively
	cargo test --quiet --manifest-path plugins/Cargo.toml
