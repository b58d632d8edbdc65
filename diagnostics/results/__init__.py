"""What all results share: tables, files, provenance, caveats and their page in a notebook."""
