"""Loss modules; no Lightning in here."""
