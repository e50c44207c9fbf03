"""From finished runs to pictures and one page: finding runs, the kinds of report, figures, HTML."""
