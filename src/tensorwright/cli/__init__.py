"""The commands: one module per verb. Nothing heavy is imported before a verb is chosen."""
