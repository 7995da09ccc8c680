_rbee_worker_completion() {
    local IFS=$'
'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" \
                   COMP_CWORD=$COMP_CWORD \
                   _RBEE_WORKER_COMPLETE=complete_bash $1 ) )
    return 0
}

complete -o default -F _rbee_worker_completion rbee-worker
