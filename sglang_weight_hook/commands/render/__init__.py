"""How answers look: text, tables, the page.  Knows nothing of arguments."""
