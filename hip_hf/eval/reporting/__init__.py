"""How results are shown and kept: tables and JSON (`report`), pictures, pages, and runs that can be
resumed (`resumable`)."""
