"""One runner a pass: rows in, columns out."""
