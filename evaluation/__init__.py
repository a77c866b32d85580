"""From score files to tables, intervals, figures and pages."""
