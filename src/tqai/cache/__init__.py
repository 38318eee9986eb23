"""The compressed cache of one layer: pages, exact window, memory accounting, storage. Knows no model."""
