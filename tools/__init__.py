"""Commands around the method: speed, tables, export, plots."""
