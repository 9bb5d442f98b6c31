"""Where records go. The file on disk is the record; everything else is a view of it."""
