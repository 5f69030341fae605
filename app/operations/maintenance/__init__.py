"""Background maintenance: resend lost events, remove rows past their retention."""
