"""Ready LightningModules, for people who start from nothing."""
