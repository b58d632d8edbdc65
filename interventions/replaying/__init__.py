"""How edited rows are run: by replay above the site, or by full forward passes that replay is checked against."""
