"""The recipe: its keys (schema), reading it (load, yaml), what is wrong with it (errors), a user's own objects. Light: nothing heavy is imported."""
