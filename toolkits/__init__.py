"""Command-line stages that turn raw data into what training reads."""
