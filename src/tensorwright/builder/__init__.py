"""The builder: from a checkpoint folder to an engine folder. Runtime code never imports it."""
