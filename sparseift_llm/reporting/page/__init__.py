"""One self-contained HTML page about training runs; `page.write_report` is the way in."""
