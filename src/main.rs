//! The binary: hands its arguments to the command line and exits as that says.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate::cli::main()
}
