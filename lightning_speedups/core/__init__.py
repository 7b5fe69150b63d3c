"""Pure arithmetic: standard library and torch only, no Lightning, no global state."""
